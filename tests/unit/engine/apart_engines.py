"""A decode engine and a prefill engine in one process, joined by queues, for tests."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from lowlat.engine.engine import Engine
from lowlat.engine.kv_transfer import KVReceiver, KVSender
from lowlat.engine.prefill_worker import PrefillWorker
from lowlat.engine.runner import ModelRunner
from lowlat.engine.stats import KVTransferStats
from lowlat.model.transformer import Transformer
from lowlat.utils.process_group import ProcessGroup, Sending

from .disk_engines import MODEL, PAGE

Queues = defaultdict[tuple[int, int], SimpleQueue[Tensor]]


class QueueGroup(ProcessGroup):
    """One process of a group of two; change: what happens to messages on their way."""

    def __init__(self, rank: int, queues: Queues, change: Callable[[Tensor], None]) -> None:
        self.rank, self.world_size, self.queues, self.change = rank, 2, queues, change
        self.is_ended = False

    @property
    def has_left(self) -> bool:
        return self.is_ended

    def send(self, tensor: Tensor, peer: int) -> Sending:
        copied = tensor.clone()
        self.change(copied)
        self.queues[self.rank, peer].put(copied)
        return Sending(self, None)

    def receive(self, out: Tensor, peer: int) -> Tensor:
        return out.copy_(self.queues[peer, self.rank].get(timeout=60.0))

    def leave(self) -> None:
        self.is_ended = True


def unchanged(tensor: Tensor) -> None:
    pass


@dataclass
class Apart:
    """The engines of a pair."""

    decode: Engine
    prefill: Engine
    worker: threading.Thread

    @property
    def stats(self) -> KVTransferStats:
        assert self.decode.connector is not None
        return self.decode.connector.recorder.snapshot()


@contextlib.contextmanager
def apart(
    model: Transformer = MODEL,
    *,
    cache_dtype: torch.dtype | None = None,
    change: Callable[[Tensor], None] = unchanged,
    permits: threading.Semaphore | None = None,
    prefill_options: dict[str, Any] | None = None,
    **options: Any,
) -> Iterator[Apart]:
    """A pair whose pages are all released at the end. change: of what the prefill engine sends.
    permits: one for each of its steps."""
    queues: Queues = defaultdict(SimpleQueue)
    here, there = QueueGroup(0, queues, unchanged), QueueGroup(1, queues, change)
    runners = [ModelRunner(model, page_size=PAGE, cache_dtype=cache_dtype) for _ in range(2)]
    shared = {"context": 97, "eos_ids": frozenset[int]()}
    decode = Engine(runners[0], receiver=KVReceiver(here, 1, runners[0]), **(shared | options))
    prefill = Engine(runners[1], **(shared | (prefill_options or {})))
    worker = PrefillWorker(prefill, KVSender(there, runners[1]), [])
    pair = Apart(decode, prefill, threading.Thread(target=worker.run, daemon=True))
    step = prefill.step

    def guarded() -> Any:
        if permits is not None:
            permits.acquire()
        return step()

    prefill.step = guarded  # pyright: ignore[reportAttributeAccessIssue]
    pair.worker.start()
    try:
        yield pair
    finally:
        if permits is not None:
            permits.release(1000)
        assert decode.connector is not None
        decode.connector.end()
        pair.worker.join(60.0)
    for engine in (decode, prefill):
        engine.check_integrity()
        assert engine.runner.allocator.num_used == 0
