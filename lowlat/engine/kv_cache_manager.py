"""KV cache manager: which pages (blocks in vLLM) a sequence holds, from the page allocator and the
prefix cache. Plain Python over request records, no tensors.
"""

from typing import TYPE_CHECKING

from lowlat.engine.kv_connector import KVConnector
from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefill_planner import PrefillPlanner
from lowlat.engine.prefix import PageContent, PrefixCache
from lowlat.engine.prefix_loader import PrefixLoader
from lowlat.engine.request import Sequence

if TYPE_CHECKING:
    from lowlat.engine.disk_cache import DiskCache
    from lowlat.engine.kv_transfer import KVReceiver


class KVCacheManager:
    """Takes and releases the pages of sequences; `max_pages` bounds the cache (None: unbounded).
    With `disk`, pages in the prefix cache are also written to and read from the disk. With
    `receiver`, prefill processes compute the pages of prompts."""

    def __init__(
        self,
        planner: PrefillPlanner,
        allocator: PageAllocator,
        prefix: PrefixCache | None,
        max_pages: int | None,
        disk: "DiskCache | None" = None,
        receiver: "KVReceiver | None" = None,
    ) -> None:
        self._planner = planner
        self.allocator = allocator
        self.prefix = prefix
        self._max_pages = max_pages
        self._page_size = planner.page_size
        self._disk = disk
        self.loader: PrefixLoader | None = None
        if disk is not None:
            assert prefix is not None, "a prefix cache on disk needs one in memory"
            self.loader = PrefixLoader(disk, prefix, allocator, self.has_free)
        self.connector: KVConnector | None = None
        if receiver is not None:
            assert prefix is not None, "pages of prefill processes enter the prefix cache"
            self.connector = KVConnector(receiver, prefix, allocator, self.has_free)

    def match(self, sequence: Sequence) -> None:
        """Replace the pages of a sequence by its prefix cache hits, if these cover more tokens. The
        last token is always computed, because its logits are needed. A prompt is computed whole if
        its hidden states are pooled or its tokens are scored."""
        if self.prefix is None or not sequence.request.reads_prefix_cache:
            return
        size = self._page_size
        count = (len(sequence.tokens) - 1) // size
        found = self.prefix.match(
            sequence.request.options.prefix_namespace,
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

    def begin_load(self, sequence: Sequence) -> bool:
        """Start to load the pages that follow a sequence's prefix cache hits: from the disk, then
        from prefill processes; False if there are none."""
        if self.loader is None and self.connector is None:
            return False
        if not sequence.request.reads_prefix_cache:
            return False
        if sequence.num_cached != len(sequence.pages) * self._page_size:
            return False
        contents, last = self._following(sequence)
        if self.loader is not None and self.loader.begin(sequence, contents, last):
            return True
        return self.connector is not None and self._begin_prefill(sequence, contents)

    def _begin_prefill(self, sequence: Sequence, contents: list[PageContent]) -> bool:
        """Start remote prefill of those pages in `contents` that the prompt fills; False if there
        are none. The last token is always computed here, because its logits are
        needed."""
        assert self.connector is not None
        count = len(sequence.request.prompt) // self._page_size - len(sequence.pages)
        contents = contents[: max(0, count)]
        if self.connector.get_num_new_matched_tokens(contents) == 0:
            return False
        self.connector.update_state_after_alloc(sequence, contents)
        return True

    def load(self, step_seconds: float | None) -> list[Sequence]:
        """Load pages for a while, from the disk (`PrefixLoader.advance`) and from prefill processes
        (`KVConnector.get_finished`); returns the fully loaded sequences. step_seconds: the time
        of the last step of other sequences; None if none runs."""
        loaded: list[Sequence] = []
        if self.loader is not None:
            for sequence in self.loader.advance(step_seconds):
                if sequence.request.started_at is None:
                    sequence.request.num_matched = sequence.num_cached
                continues = self.connector is not None and self._begin_prefill(
                    sequence, self._following(sequence)[0]
                )
                if not continues:
                    loaded.append(sequence)
        if self.connector is not None:
            loaded += self.connector.get_finished(step_seconds)
        return loaded

    def stop_load(self, sequence: Sequence) -> None:
        """Forget a loading sequence that has ended or is preempted; the caller releases its
        pages."""
        if self.loader is not None:
            self.loader.remove(sequence)
        if self.connector is not None:
            self.connector.request_finished(sequence)

    def _following(self, sequence: Sequence) -> tuple[list[PageContent], PageContent | None]:
        """The full pages that follow a sequence's pages, but for that of its last token; and that
        one, if it is full."""
        count = len(sequence.tokens) // self._page_size
        contents = self._contents(sequence, len(sequence.pages), count)
        if contents and len(sequence.tokens) % self._page_size == 0:
            return contents[:-1], contents[-1]
        return contents, None

    def _contents(self, sequence: Sequence, start: int, end: int) -> list[PageContent]:
        """Contents of a sequence's full pages `start` to `end`."""
        assert self.prefix is not None
        return self.prefix.following(
            sequence.pages[:start],
            sequence.request.options.prefix_namespace,
            sequence.tokens,
            self._page_paths(sequence, min(end, len(sequence.tokens) // self._page_size)),
        )

    def touch(self, sequence: Sequence) -> None:
        """Record the use of a sequence's pages for the LRU eviction from the disk."""
        if self._disk is not None:
            self._disk.touch(sequence.pages[: sequence.num_indexed])

    def is_next_page_of(self, leader: Sequence, sequence: Sequence) -> bool:
        """Whether `leader` is about to compute the page that `sequence` needs next."""
        if not sequence.request.reads_prefix_cache:
            return False
        size, have = self._page_size, sequence.num_cached
        needed = have + size
        if have % size or needed >= len(sequence.tokens):
            return False
        if not leader.num_cached < needed <= len(leader.tokens):
            return False
        if leader.request.options.prefix_namespace != sequence.request.options.prefix_namespace:
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
            namespace = sequence.request.options.prefix_namespace
            paths = self._page_paths(sequence, full)
            self.prefix.insert(namespace, sequence.tokens, paths, sequence.pages)
            if self._disk is not None:
                self._disk.offer(sequence.pages[sequence.num_indexed : full])
            sequence.num_indexed = full

    def withdraw(self, sequence: Sequence) -> None:
        """Remove the pages of a sequence from the prefix cache: one of them holds bad values, also
        one that was read from the disk and is not indexed."""
        if self.prefix is None:
            return
        if self._disk is not None:
            held = len(sequence.pages)
            self._disk.withdraw(self._contents(sequence, sequence.num_indexed, held))
        contents = self.prefix.withdraw(sequence.pages)
        if self._disk is not None:
            self._disk.withdraw(contents)

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
