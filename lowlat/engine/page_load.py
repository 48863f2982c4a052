"""Loading of KV cache pages computed elsewhere: base of the prefix loader (disk) and the KV
connector (prefill processes).
"""

from collections.abc import Callable
from dataclasses import dataclass

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefix import IndexedPage, PageContent, PrefixCache
from lowlat.engine.request import Sequence


@dataclass(kw_only=True, slots=True, eq=False)
class PageLoad:
    """A sequence whose next pages are loaded. `sequence.pages` holds those it has."""

    sequence: Sequence
    contents: list[PageContent]
    """Pages to load."""
    next: int = 0


class PageLoader:
    """Gives sequences their pages in order, which keeps the invariant of `PrefixCache`: the holder
    of an indexed page holds all pages before it. `has_free` is KVCacheManager's."""

    def __init__(
        self, prefix: PrefixCache, allocator: PageAllocator, has_free: Callable[[int], bool]
    ) -> None:
        self._prefix = prefix
        self._allocator = allocator
        self._has_free = has_free

    def _can_continue(self, load: PageLoad) -> bool:
        """Whether pages are left, and the page before the next one is still indexed: bad values are
        withdrawn."""
        if load.next == len(load.contents):
            return False
        last = self._last(load)
        return (b"" if last is None else last.key) == load.contents[load.next].parent_key

    def _take_indexed(self, load: PageLoad) -> bool:
        """Give a sequence its next page from memory; False if it is not indexed."""
        found = self._prefix.lookup(self._last(load), load.contents[load.next])
        if found is None:
            return False
        self._allocator.retain([found.page])
        self._append(load, found.page)
        return True

    def _take_filled(self, load: PageLoad, fill: Callable[[int], None]) -> bool:
        """Give a sequence its next page, which `fill` writes; False if no page is free, or another
        page has its key."""
        if not self._has_free(1):
            return False
        page = self._allocator.allocate(1)[0]
        fill(page)
        if not self._prefix.adopt(self._last(load), load.contents[load.next], page):
            self._allocator.release([page])
            return False
        self._append(load, page)
        return True

    def _append(self, load: PageLoad, page: int) -> None:
        sequence = load.sequence
        sequence.pages.append(page)
        sequence.num_cached = len(sequence.pages) * self._prefix.page_size
        sequence.num_indexed = len(sequence.pages)
        load.next += 1

    def _last(self, load: PageLoad) -> IndexedPage | None:
        pages = load.sequence.pages
        return self._prefix.indexed(pages[-1]) if pages else None
