"""KV connector of disaggregated prefill: has prefill processes compute prompts, and takes over
their KV cache pages as they arrive, before the sequence decodes.

Methods are named as those of vLLM's KVConnector. A page holds all layers, so the hooks per layer
(wait_for_layer_load, save_kv_layer) have one counterpart per page: `prefill_worker.save_kv_pages`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.prefill_request import PrefillRequest, TransferKind
from lowlat.engine.prefix import IndexedPage, PageContent, PrefixCache
from lowlat.engine.request import Sequence
from lowlat.engine.stats import KVTransferRecorder

if TYPE_CHECKING:
    from torch import Tensor

    from lowlat.engine.kv_transfer import Arrival, KVReceiver

logger = logging.getLogger(__name__)

LOAD_SHARE = 0.05
"""Share of the time of other sequences' steps that taking over pages may take."""
SLICE_SECONDS = 0.02
"""Seconds of taking over pages between looks at new requests, while no sequence runs."""
WAIT_SECONDS = 0.005
"""Seconds to wait for a page while no sequence runs."""

ConnectorMetadata = list[tuple[PrefillRequest, int]]
"""Requests and the processes they are for."""


@dataclass(slots=True, eq=False)
class RemotePrefill:
    """A sequence whose pages another process computes. `sequence.pages` holds those it has."""

    sequence: Sequence
    contents: list[PageContent]
    """Pages to take over."""
    number: int
    next: int = 0
    peer: int | None = None
    """The prefill process; None while another sequence is about to receive the next page."""
    has_ended: bool = False
    """Whether no more pages come: what is left is computed here."""


class KVConnector:
    """Prompts in remote prefill. `has_free` is KVCacheManager's."""

    def __init__(
        self,
        receiver: "KVReceiver",
        prefix: PrefixCache,
        allocator: PageAllocator,
        has_free: Callable[[int], bool],
    ) -> None:
        self.recorder = KVTransferRecorder()
        self._receiver = receiver
        self._prefix = prefix
        self._allocator = allocator
        self._has_free = has_free
        self._loads: dict[int, RemotePrefill] = {}
        self._credit = 0.0
        self._next_number = 0

    @property
    def computing(self) -> list[Sequence]:
        """Sequences whose prompts prefill processes compute."""
        return [load.sequence for load in self._loads.values() if load.peer is not None]

    def end(self) -> None:
        """End the prefill processes; the engine cannot be used afterwards."""
        self._receiver.end()

    # --- scheduler side ------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, contents: list[PageContent]) -> int:
        """Tokens of a prompt that prefill processes can provide; contents: its pages that are
        neither in memory nor on disk."""
        return len(contents) * self._prefix.page_size

    def update_state_after_alloc(self, sequence: Sequence, contents: list[PageContent]) -> None:
        """Have the pages that follow `sequence.pages` computed. They are allocated as they
        arrive."""
        self._loads[self._next_number] = RemotePrefill(sequence, contents, self._next_number)
        self._next_number += 1

    def build_connector_meta(self) -> ConnectorMetadata:
        """The requests that prefill processes must get now. A page that is on its way for another
        sequence is not requested."""
        meta: ConnectorMetadata = []
        waiting = [load for load in self._loads.values() if load.peer is None]
        if not waiting:
            return meta
        loads = self._loads.values()
        coming = {c.key for own in loads if own.peer is not None for c in own.contents[own.next :]}
        for load in waiting:
            self._take_from_memory(load)
            if load.has_ended or load.contents[load.next].key in coming:
                continue
            load.peer = min(self._receiver.peers, key=self._num_expected)
            coming.update(content.key for content in load.contents[load.next :])
            meta.append((_request(load), load.peer))
        return meta

    def request_finished(self, sequence: Sequence) -> None:
        """Forget a sequence that has ended or is preempted; the caller releases its pages."""
        for load in [load for load in self._loads.values() if load.sequence is sequence]:
            self._abort(load)
            del self._loads[load.number]

    # --- worker side ---------------------------------------------------------------------------

    def start_load_kv(self, meta: ConnectorMetadata) -> None:
        """Send requests; returns at once."""
        for request, peer in meta:
            self._receiver.send(request, peer)

    def get_finished(self, step_seconds: float | None) -> list[Sequence]:
        """Take over pages for a while; returns the sequences that have all pages that come.
        step_seconds: the time of the last step of other sequences; None if none runs."""
        self.start_load_kv(self.build_connector_meta())
        is_alone = step_seconds is None
        if step_seconds is None:
            self._credit = SLICE_SECONDS
        else:
            self._credit = min(self._credit, 0.0) + LOAD_SHARE * step_seconds
        finished = self._finished()
        while self._credit > 0.0:
            waits = is_alone and self._loads and not finished
            arrival = self._receiver.poll(WAIT_SECONDS if waits else 0.0)
            if arrival is None:
                break
            started = time.perf_counter()
            self._take(arrival)
            finished += self._finished()
            self._credit -= time.perf_counter() - started
        return finished

    # --- pages ---------------------------------------------------------------------------------

    def _take(self, arrival: "Arrival") -> None:
        load = self._loads.get(arrival.number)
        if load is not None and not load.has_ended:
            if arrival.page is None:
                load.has_ended = True
            else:
                self._take_page(load, arrival.page)
        self._receiver.give_back(arrival)

    def _take_page(self, load: RemotePrefill, received: "Tensor") -> None:
        """Give a sequence its next page. A page that is damaged, or finds no free page, ends the
        load: the engine computes the rest."""
        content = load.contents[load.next]
        damage = self._receiver.damage(content, received)
        tokens = self._prefix.page_size if damage is None else 0
        self.recorder.received(len(received), tokens)
        if damage is not None:
            logger.warning("a KV cache page has arrived %s and is computed again", damage)
            self.recorder.damaged()
        if damage is not None or not self._follows(load, content):
            return self._abort(load)
        found = self._prefix.lookup(self._last(load), content)
        if found is not None:
            self._allocator.retain([found.page])
            return self._append(load, found.page)
        if not self._has_free(1):
            return self._abort(load)
        page = self._allocator.allocate(1)[0]
        self._receiver.fill(page, received)
        if not self._prefix.adopt(self._last(load), content, page):
            self._allocator.release([page])
            return self._abort(load)
        self._append(load, page)

    def _take_from_memory(self, load: RemotePrefill) -> None:
        """Give a sequence the pages that others have received."""
        while not load.has_ended:
            content = load.contents[load.next]
            if not self._follows(load, content):
                return self._abort(load)
            found = self._prefix.lookup(self._last(load), content)
            if found is None:
                return
            self._allocator.retain([found.page])
            self._append(load, found.page)

    def _append(self, load: RemotePrefill, page: int) -> None:
        sequence = load.sequence
        sequence.pages.append(page)
        sequence.num_cached = len(sequence.pages) * self._prefix.page_size
        sequence.num_indexed = len(sequence.pages)
        if load.peer is None and sequence.request.started_at is None:
            sequence.request.num_matched = sequence.num_cached
        load.next += 1
        load.has_ended = load.next == len(load.contents)

    def _last(self, load: RemotePrefill) -> IndexedPage | None:
        pages = load.sequence.pages
        return self._prefix.indexed(pages[-1]) if pages else None

    def _follows(self, load: RemotePrefill, content: PageContent) -> bool:
        """Whether the page before `content` is still indexed: bad values are withdrawn."""
        last = self._last(load)
        return (b"" if last is None else last.key) == content.parent_key

    def _abort(self, load: RemotePrefill) -> None:
        if load.peer is not None and not load.has_ended:
            request = PrefillRequest(kind=TransferKind.ABORT, number=load.number)
            self._receiver.send(request, load.peer)
        load.has_ended = True

    def _finished(self) -> list[Sequence]:
        ended = [load for load in self._loads.values() if load.has_ended]
        for load in ended:
            del self._loads[load.number]
        return [load.sequence for load in ended]

    def _num_expected(self, peer: int) -> int:
        """Pages that a process has yet to send."""
        loads = [load for load in self._loads.values() if load.peer == peer]
        return sum(len(load.contents) - load.next for load in loads)


def _request(load: RemotePrefill) -> PrefillRequest:
    request, contents = load.sequence.request, load.contents
    return PrefillRequest(
        kind=TransferKind.PREFILL,
        number=load.number,
        first=contents[load.next].depth,
        count=contents[-1].depth + 1,
        lora_int_id=request.options.lora_int_id,
        priority=request.options.priority,
        cache_namespace=request.options.cache_namespace,
        prompt=request.prompt,
    )
