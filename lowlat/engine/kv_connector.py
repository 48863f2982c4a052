"""KV connector of disaggregated prefill: sends prompts to prefill processes, and receives their KV
cache pages as they are computed, before the sequence decodes.

Methods are named as those of vLLM's KVConnector. A page holds all layers, so the hooks per layer
(wait_for_layer_load, save_kv_layer) have one counterpart per page: `prefill_worker.save_kv_pages`.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from lowlat.engine.page_allocator import PageAllocator
from lowlat.engine.page_load import PageLoad, PageLoader
from lowlat.engine.prefill_request import PrefillRequest, TransferKind
from lowlat.engine.prefix import PageContent, PrefixCache
from lowlat.engine.request import Sequence
from lowlat.engine.stats import KVTransferRecorder

if TYPE_CHECKING:
    from torch import Tensor

    from lowlat.engine.kv_transfer import Arrival, KVReceiver

logger = logging.getLogger(__name__)

LOAD_SHARE = 0.05
"""Time that receiving pages may take, as a share of the other sequences' step time."""
SLICE_SECONDS = 0.02
"""Seconds of receiving pages between checks for new requests, while no sequence runs."""
WAIT_SECONDS = 0.005
"""Seconds to wait for a page while no sequence runs."""

ConnectorMetadata = list[tuple[PrefillRequest, int]]
"""Requests and the processes they are for."""


@dataclass(kw_only=True, slots=True, eq=False)
class RemotePrefill(PageLoad):
    """A sequence whose pages another process computes."""

    number: int
    peer: int | None = None
    """The prefill process; None while another sequence is about to receive the next page."""
    has_ended: bool = False
    """Whether no more pages come: what is left is computed here."""


class KVConnector(PageLoader):
    """Tracks prompts in remote prefill: what was sent, and which pages have arrived."""

    def __init__(
        self,
        receiver: "KVReceiver",
        prefix: PrefixCache,
        allocator: PageAllocator,
        has_free: Callable[[int], bool],
    ) -> None:
        super().__init__(prefix, allocator, has_free)
        self.recorder = KVTransferRecorder()
        self._receiver = receiver
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
        number = self._next_number
        self._loads[number] = RemotePrefill(sequence=sequence, contents=contents, number=number)
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
            self._take_received(load)
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
        """Receive pages for a while; returns the sequences that get no more pages.
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
        if damage is not None or not self._can_continue(load):
            return self._abort(load)
        fill = partial(self._receiver.fill, received=received)
        if not self._take_indexed(load) and not self._take_filled(load, fill):
            return self._abort(load)
        load.has_ended = load.next == len(load.contents)

    def _take_received(self, load: RemotePrefill) -> None:
        """Give a waiting sequence the pages that others have received."""
        while self._can_continue(load) and self._take_indexed(load):
            if load.sequence.request.started_at is None:
                load.sequence.request.num_matched = load.sequence.num_cached
        load.has_ended = not self._can_continue(load)

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
