"""KV cache manager: which pages (blocks in vLLM) a sequence holds, from the page allocator and the
prefix cache. Plain Python over request records, no tensors.
"""

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefill_planner import PrefillPlanner
from lowlat.engine.prefix import PrefixCache
from lowlat.engine.request import Sequence


class KVCacheManager:
    """Takes and releases the pages of sequences; `max_pages` bounds the cache (None: unbounded)."""

    def __init__(
        self,
        planner: PrefillPlanner,
        allocator: PageAllocator,
        prefix: PrefixCache | None,
        max_pages: int | None,
    ) -> None:
        self._planner = planner
        self.allocator = allocator
        self.prefix = prefix
        self._max_pages = max_pages
        self._page_size = planner.page_size

    def match(self, sequence: Sequence) -> None:
        """Replace the pages of a sequence by its prefix cache hits, if these cover more tokens. The
        last token is always computed, because its logits are needed."""
        if self.prefix is None:
            return
        size = self._page_size
        count = (len(sequence.tokens) - 1) // size
        found = self.prefix.match(
            sequence.request.options.cache_namespace,
            sequence.tokens[: count * size],
            self._page_paths(sequence, count),
        )
        if len(found) * size <= sequence.num_cached:
            self.allocator.release(found)
        else:
            self.allocator.release(sequence.pages)
            sequence.pages = found
            sequence.num_cached, sequence.num_indexed = len(found) * size, len(found)
        # After its first step a request may match its own pages, which do not count as hits.
        if sequence.request.started_at is None:
            sequence.request.num_matched = sequence.num_cached

    def is_next_page_of(self, leader: Sequence, sequence: Sequence) -> bool:
        """Whether `leader` is about to compute the page that `sequence` needs next."""
        size, have = self._page_size, sequence.num_cached
        needed = have + size
        if have % size or needed >= len(sequence.tokens):
            return False
        if not leader.num_cached < needed <= len(leader.tokens):
            return False
        if leader.request.options.cache_namespace != sequence.request.options.cache_namespace:
            return False
        count = needed // size
        return leader.tokens[:needed] == sequence.tokens[:needed] and (
            self._page_paths(leader, count) == self._page_paths(sequence, count)
        )

    def advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Count `num_tokens` more tokens as cached and index full pages in the prefix cache."""
        sequence.num_cached += num_tokens
        full = sequence.num_cached // self._page_size
        if self.prefix is not None and full > sequence.num_indexed:
            namespace = sequence.request.options.cache_namespace
            paths = self._page_paths(sequence, full)
            self.prefix.insert(namespace, sequence.tokens, paths, sequence.pages)
            sequence.num_indexed = full

    def withdraw(self, sequence: Sequence) -> None:
        """Remove the pages of a sequence from the prefix cache: one of them holds bad values."""
        if self.prefix is not None:
            self.prefix.withdraw(sequence.pages)

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Pages that a sequence needs for `num_tokens` entries beyond those it has."""
        return max(0, -(-num_tokens // self._page_size) - len(sequence.pages))

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Extend the pages of a sequence to `num_tokens` entries; False if too few pages are
        free."""
        missing = self.num_missing(sequence, num_tokens)
        if not self.has_free(missing):
            return False
        if missing > 0:
            sequence.pages += self.allocator.allocate(missing)
        return True

    def fork(self, first: Sequence, other: Sequence) -> tuple[int, int] | None:
        """Copy-on-write of parallel sampling (n > 1): share the full pages of `first` with `other`,
        and copy a partly filled last page, which both will write. Returns (page, copy) for the
        caller to copy before the next step, None if there is no such page. The caller ensures that
        a page is free.
        """
        num_full, rest = divmod(first.num_cached, self._page_size)
        self.allocator.retain(first.pages[:num_full])
        other.pages = first.pages[:num_full]
        copy = None
        if rest:
            other.pages += self.allocator.allocate(1)
            copy = first.pages[num_full], other.pages[num_full]
        other.num_cached, other.num_indexed = first.num_cached, first.num_indexed
        return copy

    def release(self, sequence: Sequence) -> None:
        self.allocator.release(sequence.pages)
        sequence.pages = []
        sequence.num_cached = sequence.num_indexed = 0

    def has_free(self, count: int) -> bool:
        """Whether `count` pages can be allocated; the allocator grows if it may."""
        return self.allocator.make_available(count, self._max_pages)

    def _page_paths(self, sequence: Sequence, count: int) -> list[str]:
        prompt = len(sequence.request.prompt)
        return [self._planner.page_path(page, prompt) for page in range(count)]
