"""Which pages of the cache are in use, and by how many sequences.

Owns page numbers and their reference counts. Knows no tensor: rows live in `attention.cache`.
"""

import heapq
from collections.abc import Iterable


class PagePool:
    """Page numbers 0 .. num_pages - 1, each free or held by one or more sequences.

    `allocate`, `retain`, `release` and `grow` mutate; everything else reads. A page may be written
    only by a sequence that is its one holder (`is_shared` is false); a shared page is copied
    first. Not thread-safe: only the engine's thread calls it. A caller that breaks the contract
    (frees a free page, allocates more than `num_free`) gets an AssertionError and the pool stays
    as it was.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 0, num_pages
        self._ref_counts = [0] * num_pages
        # A heap: the lowest number is taken first, so a lone sequence's pages follow each other
        # and its rows can be read in place.
        self._free = list(range(num_pages))

    @property
    def num_pages(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages; the caller is the one holder of each."""
        assert 0 <= count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._ref_counts[page] = 1
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """Add one holder to each of `pages`, which must be in use."""
        pages = list(pages)
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free"
        for page in pages:
            self._ref_counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one holder from each of `pages` (distinct); a page nobody holds is free again."""
        pages = list(pages)
        assert len(set(pages)) == len(pages), "a page is released twice"
        for page in pages:
            assert self._ref_counts[page] > 0, f"page {page} is free already"
        for page in pages:
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                heapq.heappush(self._free, page)

    def is_shared(self, page: int) -> bool:
        return self._ref_counts[page] > 1

    def grow(self, num_pages: int) -> None:
        """Extend the pool to `num_pages` pages; pages in use keep their numbers."""
        assert num_pages >= self.num_pages, (num_pages, self.num_pages)
        added = range(self.num_pages, num_pages)
        for page in added:
            heapq.heappush(self._free, page)
        self._ref_counts += [0] * len(added)

    def check_integrity(self, holders: Iterable[Iterable[int]] | None = None) -> None:
        """Raise AssertionError unless the free list and the counts agree, and `holders` (the page
        list of every sequence), where given, account for exactly the pages in use."""
        assert len(set(self._free)) == len(self._free), "a page is on the free list twice"
        assert all(0 <= page < self.num_pages for page in self._free), "an unknown page is free"
        free = {page for page, count in enumerate(self._ref_counts) if count == 0}
        assert free == set(self._free), "the free list and the reference counts disagree"
        if holders is None:
            return
        held = [0] * self.num_pages
        for pages in holders:
            for page in pages:
                held[page] += 1
        assert held == self._ref_counts, "the holders and the reference counts disagree"
