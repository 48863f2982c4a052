"""KV cache page allocator (block allocator in vLLM): free, used and cached pages, reference counts.

Owns page numbers, their reference counts and the prefix cache's eviction in LRU order. Knows no
tensor (entries are in `attention.cache`) and no token (the content of a cached page is in
`engine.prefix`).
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable


class PageAllocator:
    """Page numbers 0 .. num_pages - 1 (num_blocks in vLLM), each in exactly one of three states:

    free    no holder, no content;
    used    held by one or more sequences (its reference count);
    cached  no holder; its entries stay valid until the page is evicted.

    When its last holder releases it, a used page marked by `keep` becomes cached, any other becomes
    free. `allocate` takes free pages before it evicts cached ones; the listener learns of each
    eviction.

    What mutates: `allocate`, `retain`, `release`, `keep`, `unkeep`, `evict_all`, `grow`. Not
    thread-safe: only the engine's thread calls it. A page may be written only by a sequence that is
    its only holder (`is_shared` is false), and not at all after `keep` has marked it. A caller that
    breaks the contract (releases a free page, allocates more than `num_available`) gets an
    AssertionError, under `python -O` too, and the allocator does not change.
    """

    def __init__(self, num_pages: int) -> None:
        require(num_pages >= 0, "an allocator cannot have a negative number of pages")
        self._ref_counts = [0] * num_pages
        self._is_kept = bytearray(num_pages)
        # A heap: the lowest number is taken first, so the pages of a lone sequence are contiguous
        # and its entries can be read in place.
        self._free = list(range(num_pages))
        # LRU eviction, least recently released first. Finding a plain dict's first key scans
        # removed keys.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._on_evict: Callable[[int], None] | None = None

    @property
    def num_pages(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Pages without content (free blocks)."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages without a holder whose entries are valid."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can return: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_available

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, at most `num_available`; the caller is the only holder of each.

        Free pages come first, the lowest number first; then cached ones are evicted, the least
        recently released first, and handed out in the order of their numbers.
        """
        if not 0 <= count <= self.num_available:
            raise AssertionError(f"{count} pages wanted, {self.num_available} available")
        num_evicted = max(0, count - len(self._free))
        pages = [heapq.heappop(self._free) for _ in range(count - num_evicted)]
        pages += sorted([self._evict() for _ in range(num_evicted)])
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add one holder to each of `pages`, none of which may be free."""
        pages = list(pages)
        for page in pages:
            if self.is_free(page):
                raise AssertionError(f"page {page} is free")
        for page in pages:
            if self._ref_counts[page] == 0:
                del self._cached[page]
            self._ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one holder from each of `pages` (distinct, in the order of the sequence); a page
        without holders becomes free, or cached if it is marked by `keep`.

        Of pages that become cached together the last is evicted first: a page is of no use without
        the pages before it.
        """
        pages = list(pages)
        if len(set(pages)) != len(pages):
            raise AssertionError("a page is released twice")
        for page in pages:
            if self._ref_counts[page] == 0:
                raise AssertionError(f"page {page} has no holder")
        for page in reversed(pages):
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                if self._is_kept[page]:
                    self._cached[page] = None
                else:
                    heapq.heappush(self._free, page)

    def listen(self, on_evict: Callable[[int], None]) -> None:
        """Call `on_evict` with each evicted page, before it is handed out. An allocator has one
        listener."""
        require(self._on_evict is None, "another index listens to the allocator")
        self._on_evict = on_evict

    def keep(self, page: int) -> None:
        """Mark a full used page: it becomes cached, not free, when its last holder releases it. Its
        entries must not be written after this call."""
        if self._ref_counts[page] == 0 or self._is_kept[page]:
            raise AssertionError(f"page {page} is not in use, or marked already")
        self._is_kept[page] = True

    def unkeep(self, page: int) -> None:
        """Undo `keep` without calling the listener: a cached page becomes free at once, a used one
        when its last holder releases it."""
        if not self._is_kept[page]:
            raise AssertionError(f"page {page} is not marked")
        self._is_kept[page] = False
        if self._ref_counts[page] == 0:
            del self._cached[page]
            heapq.heappush(self._free, page)

    def evict_all(self) -> None:
        """Make every cached page free, the least recently released first."""
        while self._cached:
            heapq.heappush(self._free, self._evict())

    def is_shared(self, page: int) -> bool:
        return self._ref_counts[page] > 1

    def is_free(self, page: int) -> bool:
        return self._ref_counts[page] == 0 and not self._is_kept[page]

    def is_kept(self, page: int) -> bool:
        """Whether the page is cached, or will be when its last holder releases it."""
        return bool(self._is_kept[page])

    def num_holders(self, page: int) -> int:
        return self._ref_counts[page]

    def eviction_order(self) -> list[int]:
        """The cached pages, the next to be evicted first."""
        return list(self._cached)

    def make_available(self, count: int, max_pages: int | None) -> bool:
        """Whether `count` pages are available. If not, the allocator first grows, at least to twice
        its pages and at most to `max_pages` (None: unbounded)."""
        if count <= self.num_available:
            return True
        wanted = max(2 * self.num_pages, self.num_used + count)
        if max_pages is not None:
            wanted = min(wanted, max_pages)
        if wanted > self.num_pages:
            self.grow(wanted)
        return count <= self.num_available

    def grow(self, num_pages: int) -> None:
        """Extend the allocator to `num_pages` pages; existing pages do not change."""
        if num_pages < self.num_pages:
            raise AssertionError(f"{self.num_pages} pages cannot become {num_pages}")
        added = range(self.num_pages, num_pages)
        for page in added:
            heapq.heappush(self._free, page)
        self._ref_counts += [0] * len(added)
        self._is_kept += bytes(len(added))

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless every page is in one state and the lists of free and cached
        pages agree with counts and marks. `holders` (the page list of every sequence), if given,
        must account for exactly the pages in use. O(number of pages)."""
        free, cached = set(self._free), set(self._cached)
        require(len(free) == len(self._free), "a page is on the free list twice")
        require(not free & cached, "a page is both free and cached")
        require(len(self._is_kept) == self.num_pages, "counts and marks differ in length")
        unheld = {page for page, count in enumerate(self._ref_counts) if count == 0}
        kept = {page for page in unheld if self._is_kept[page]}
        require(free == unheld - kept, "the free list and the reference counts disagree")
        require(cached == kept, "the cached pages and the marks of kept pages disagree")
        num_used = sum(count > 0 for count in self._ref_counts)
        total = self.num_free + self.num_cached + num_used
        require(total == self.num_pages, "free, cached and used pages are not all pages")
        if holders is None:
            return
        held = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                held[page] += 1
        require(held == self._ref_counts, "the holders and the reference counts disagree")

    def _evict(self) -> int:
        """Evict the least recently released page; the caller puts it into a list."""
        page, _ = self._cached.popitem(last=False)
        self._is_kept[page] = False
        if self._on_evict is not None:
            self._on_evict(page)
        return page


def require(condition: bool, message: str) -> None:
    """An assertion that `python -O` does not drop."""
    if not condition:
        raise AssertionError(message)
