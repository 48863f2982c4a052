"""KV transfer between prefill and decode processes (disaggregated prefill): requests one way, KV
cache pages the other, over torch.distributed send and recv.

The unit is the file of `page_folder`: header, checksum and payload of a page. Threads wait for
messages, so neither side's engine does. `KVReceiver` and `KVSender` are named as in SGLang.
"""

import atexit
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import torch
from torch import Tensor

from lowlat.engine.page_folder import PageFormat
from lowlat.engine.prefill_request import PrefillRequest, TransferKind
from lowlat.engine.prefix import PageContent
from lowlat.engine.runner import ModelRunner
from lowlat.engine.tensor_memory import as_memory
from lowlat.utils.process_group import ProcessGroup

logger = logging.getLogger(__name__)

BUFFER_BYTES = 64 * 2**20
"""Memory of each side for pages on their way."""
MIN_BUFFERS = 2
END_SECONDS = 120.0
"""Most seconds that the end waits for prefill processes, which may be in a step."""
FINGERPRINT = bytes(32)
"""Constant in the headers of sent pages: processes compare model and options when they start."""


def page_format(runner: ModelRunner) -> PageFormat:
    """The format of pages on their way."""
    return PageFormat(
        fingerprint=FINGERPRINT,
        page_size=runner.cache.page_size,
        payload_bytes=runner.page_bytes,
    )


@dataclass(frozen=True, slots=True)
class Arrival:
    """A page of a prompt, or the failure of its prefill."""

    number: int
    page: Tensor | None
    """Header, checksum and payload; for `KVReceiver.give_back`. None: the prefill has failed."""


class Buffers:
    """A bounded number of buffers of `size` bytes; taking one waits until one is free."""

    def __init__(self, size: int) -> None:
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(max(MIN_BUFFERS, BUFFER_BYTES // size)):
            self._free.put(torch.empty(size, dtype=torch.uint8))
        self.take = self._free.get
        self.give_back = self._free.put


class KVReceiver:
    """The decode side: asks the first processes of `groups` prefill groups for pages. `group` is
    the whole run.

    Per peer, one thread sends requests and one receives pages. Methods are the engine's thread's.
    """

    def __init__(self, group: ProcessGroup, groups: int, runner: ModelRunner) -> None:
        self.format = page_format(runner)
        size = group.world_size // (1 + groups)
        self.peers = peers = [*range(size, group.world_size, size)]
        self._group, self._runner = group, runner
        self._buffers = Buffers(self.format.file_bytes)
        self._arrivals: SimpleQueue[Arrival] = SimpleQueue()
        self._outboxes: dict[int, SimpleQueue[PrefillRequest]] = {p: SimpleQueue() for p in peers}
        bodies = (self._send_requests, self._receive_pages)
        self._threads = [_start(group, body, peer) for peer in peers for body in bodies]
        self._has_ended = False
        atexit.register(self.end)

    def send(self, request: PrefillRequest, peer: int) -> None:
        """Queue a request."""
        self._outboxes[peer].put(request)

    def poll(self, seconds: float = 0.0) -> Arrival | None:
        """The next page, waiting up to `seconds`."""
        try:
            return self._arrivals.get(block=seconds > 0.0, timeout=seconds or None)
        except Empty:
            return None

    def damage(self, content: PageContent, page: Tensor) -> str | None:
        """What is wrong with a page that should hold `content`; None if it is valid."""
        return self.format.damage(content, as_memory(page))

    def fill(self, page: int, received: Tensor) -> None:
        """Fill a page of the KV cache with a valid one that has arrived."""
        self._runner.import_page(page, received[self.format.payload_start :])

    def give_back(self, arrival: Arrival) -> None:
        """Return the buffer of an arrival."""
        if arrival.page is not None:
            self._buffers.give_back(arrival.page)

    def end(self) -> None:
        """End the prefill processes, then those of the runner."""
        if self._has_ended or self._group.has_left:
            return
        self._has_ended = True
        for peer in self.peers:
            self.send(PrefillRequest(kind=TransferKind.END), peer)
        deadline = time.monotonic() + END_SECONDS
        while any(thread.is_alive() for thread in self._threads):
            arrival = self.poll(0.01)
            if arrival is not None:
                self.give_back(arrival)
            if time.monotonic() > deadline:
                return self._group.abandon("process 0 has ended")
        self._runner.end()
        self._group.leave()

    def _send_requests(self, peer: int) -> None:
        kind = TransferKind.PREFILL
        while kind != TransferKind.END:
            request = self._outboxes[peer].get()
            record, kind = torch.tensor(request.encode()), request.kind
            self._group.send(torch.tensor([len(record)]), peer).wait()
            self._group.send(record, peer).wait()

    def _receive_pages(self, peer: int) -> None:
        header = torch.empty(2, dtype=torch.int64)
        while True:
            kind, number = self._group.receive(header, peer).tolist()
            if kind == TransferKind.END:
                return
            page = None
            if kind == TransferKind.PAGE:
                page = self._group.receive(self._buffers.take(), peer)
            self._arrivals.put(Arrival(number, page))


class KVSender:
    """The prefill side: receives requests of process 0 and sends it pages. Two threads; methods are
    the engine's thread's."""

    def __init__(self, group: ProcessGroup, runner: ModelRunner) -> None:
        self._group, self._runner = group, runner
        self._format = page_format(runner)
        self._buffers = Buffers(self._format.file_bytes)
        self._inbox: SimpleQueue[PrefillRequest] = SimpleQueue()
        self._outbox: SimpleQueue[tuple[TransferKind, int, Tensor | None]] = SimpleQueue()
        self._sending = _start(group, self._send_pages)
        _start(group, self._receive_requests)

    def requests(self, seconds: float | None) -> Iterator[PrefillRequest]:
        """The requests that have come, waiting for the first up to `seconds`; None: forever."""
        with suppress(Empty):
            yield self._inbox.get(block=seconds != 0.0, timeout=seconds or None)
            while True:
                yield self._inbox.get_nowait()

    def send(self, number: int, page: int, content: PageContent) -> None:
        """Copy a page of the KV cache and queue it; waits for a free buffer."""
        buffer = self._buffers.take()
        self._runner.export_page(page, buffer[self._format.payload_start :])
        self._format.seal(content, as_memory(buffer))
        self._outbox.put((TransferKind.PAGE, number, buffer))

    def fail(self, number: int) -> None:
        """Report that a prompt's remaining pages do not come."""
        self._outbox.put((TransferKind.FAILED, number, None))

    def end(self) -> None:
        """Send what is queued, acknowledge the end, and end the runner's processes."""
        self._outbox.put((TransferKind.END, 0, None))
        self._sending.join()
        self._runner.end()
        self._group.leave()

    def _receive_requests(self) -> None:
        kind = TransferKind.PREFILL
        while kind != TransferKind.END:
            length = self._group.receive(torch.empty(1, dtype=torch.int64), 0)
            record = torch.empty(int(length), dtype=torch.int64)
            request = PrefillRequest.decode(self._group.receive(record, 0).tolist())
            kind = request.kind
            self._inbox.put(request)

    def _send_pages(self) -> None:
        kind = TransferKind.PAGE
        while kind != TransferKind.END:
            kind, number, buffer = self._outbox.get()
            self._group.send(torch.tensor([kind, number]), 0).wait()
            if buffer is not None:
                self._group.send(buffer, 0).wait()
                self._buffers.give_back(buffer)


def _start(group: ProcessGroup, body: Callable[..., None], *arguments: int) -> threading.Thread:
    """A thread, whose error ends all processes: they would wait for its messages."""

    def guarded() -> None:
        try:
            body(*arguments)
        except Exception as error:
            logger.exception("%s failed", group.label)
            group.fail(f"{group.label} failed: {type(error).__name__}")

    thread = threading.Thread(target=guarded, name="lowlat-kv", daemon=True)
    thread.start()
    return thread
