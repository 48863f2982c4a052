"""Prefix loader: reads the pages of waiting requests from the prefix cache on disk.

Pages are read on the engine's thread between steps, one request after the other. While other
sequences run, reading takes at most LOAD_SHARE of their time and never waits for the disk; a
request that is alone reads as fast as it can. What is missing or damaged is computed instead.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.page_load import PageLoad, PageLoader
from lowlat.engine.prefix import PageContent, PrefixCache
from lowlat.engine.request import Sequence

if TYPE_CHECKING:
    from lowlat.engine.disk_cache import DiskCache

LOAD_SHARE = 0.03
"""Share of the time of other sequences' steps that reading may take."""
SLICE_SECONDS = 0.05
"""Seconds of reading between looks at new requests, while no sequence runs."""
READ_AHEAD = 16
"""Files that the system reads ahead."""
STALL_SECONDS = 1.0
"""After this long without a page, reading waits for the disk although other sequences run."""


@dataclass(kw_only=True, slots=True, eq=False)
class PrefixLoad(PageLoad):
    """A sequence whose pages are being read."""

    last: PageContent | None
    """The page that the sequence's last token fills, if it does."""
    advanced_at: float
    """Clock in seconds of the last page, or of the start."""


class PrefixLoader(PageLoader):
    """Loads of several sequences, in order of their beginning."""

    def __init__(
        self,
        disk: "DiskCache",
        prefix: PrefixCache,
        allocator: PageAllocator,
        has_free: Callable[[int], bool],
    ) -> None:
        super().__init__(prefix, allocator, has_free)
        self._disk = disk
        self._loads: list[PrefixLoad] = []
        self._credit = 0.0
        """Seconds that reading may take now."""
        self._page_seconds = 0.001
        """Seconds that a page took."""

    @property
    def sequences(self) -> list[Sequence]:
        return [load.sequence for load in self._loads]

    def begin(
        self, sequence: Sequence, contents: list[PageContent], last: PageContent | None
    ) -> bool:
        """Start to load the pages that follow `sequence.pages`, and `last` if the sequence's last
        token fills a page; False if the first of them is not on disk."""
        wanted = contents if last is None else [*contents, last]
        if not wanted or not self._disk.has(wanted[0]):
            return False
        for content in wanted[:READ_AHEAD]:
            self._disk.prefetch(content)
        now = time.perf_counter()
        self._loads.append(
            PrefixLoad(sequence=sequence, contents=contents, last=last, advanced_at=now)
        )
        return True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended or is preempted; the caller releases its pages."""
        self._loads = [load for load in self._loads if load.sequence is not sequence]

    def advance(self, step_seconds: float | None) -> list[Sequence]:
        """Read pages for a while; returns the sequences that have all their pages. step_seconds:
        the time of the last step of other sequences; None if none runs."""
        if not self._loads:
            self._credit = 0.0
            return []
        is_alone = step_seconds is None
        if step_seconds is None:
            self._credit = SLICE_SECONDS
        else:
            self._credit = min(self._credit + LOAD_SHARE * step_seconds, SLICE_SECONDS)
        finished: list[Sequence] = []
        while self._loads and self._credit >= (0.0 if is_alone else self._page_seconds):
            load, started = self._loads[0], time.perf_counter()
            may_wait = is_alone or started - load.advanced_at > STALL_SECONDS
            result = self._load_page(load, may_wait=may_wait)
            now = time.perf_counter()
            self._credit -= now - started
            if result == "pending":
                break
            if result == "done":
                self._loads.pop(0)
                finished.append(load.sequence)
            else:
                self._page_seconds = min(now - started, 2 * self._page_seconds, SLICE_SECONDS)
                load.advanced_at = now
        return finished

    def _load_page(
        self, load: PrefixLoad, *, may_wait: bool
    ) -> Literal["loaded", "pending", "done"]:
        """Give a sequence its next page, from memory or from the disk."""
        if not self._can_continue(load):
            return self._load_last(load, may_wait=may_wait)
        if self._take_indexed(load):
            return "loaded"
        if not self._has_free(1):
            return "done"
        content, ahead = load.contents[load.next], load.next + READ_AHEAD
        result = self._disk.read(content, may_wait=may_wait)
        if result == "pending":
            return "pending"
        if result != "read" or not self._take_filled(load, self._disk.fill):
            return "done"
        if ahead < len(load.contents):
            self._disk.prefetch(load.contents[ahead])
        return "loaded"

    def _load_last(self, load: PrefixLoad, *, may_wait: bool) -> Literal["pending", "done"]:
        """Give a sequence the page of its last token, which is computed again for its logits: the
        page is the sequence's own, since indexed pages are not written."""
        content, before = load.last, self._last(load)
        key = b"" if before is None else before.key
        if content is None or content.parent_key != key or not self._has_free(1):
            return "done"
        result = self._disk.read(content, may_wait=may_wait)
        if result == "pending":
            return "pending"
        if result == "read":
            (page,) = self._allocator.allocate(1)
            self._disk.fill(page)
            load.sequence.pages.append(page)
            load.sequence.num_cached = len(load.sequence.tokens) - 1
        return "done"
