"""Model runner over several processes: pipeline, tensor and expert parallelism for serving.

Every process has a runner of its share of the model. Process 0 runs the engine; whatever its runner
does it announces as a `StepRecord`, and the others do the same with their layers and their part of
the KV cache. Page numbers are the same in all processes.
"""

import atexit
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lowlat.config.model import GQAConfig
from lowlat.config.serving_layout import ServingLayout
from lowlat.engine.cache_fingerprint import weights_digest
from lowlat.engine.expert_balancer import ExpertBalancer, ExpertBalancing
from lowlat.engine.request import Chunk
from lowlat.engine.runner import ModelRunner
from lowlat.engine.step_record import RecordKind, StepRecord
from lowlat.model.share import ModelShare
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from lowlat.utils.memory import proportional_memory
from lowlat.utils.process_group import ProcessGroup, Sending, ignoring_signals

T = TypeVar("T")
logger = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = 256
"""A step of several sequences and at least twice as many tokens is divided, so that stages compute
at the same time. Fewer tokens are bound by weight bandwidth, and would read the weights again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessStats:
    """What one process has sent, its memory and its processors."""

    messages: int
    bytes: int
    memory: int
    """Proportional set size in bytes; 0 where the system does not report it."""
    cpus: list[int]
    """Processors on which it may run; empty where the system does not report them."""


@final
class GroupExchange:
    """The exchange of a process's stage."""

    def __init__(self, group: ProcessGroup, share: ModelShare) -> None:
        self._group = group
        # In order of TENSOR and EXPERT.
        self._subgroups = [group.subgroup(size) for size in (share.tensor, share.experts)]

    def gather(self, group: int, own: Tensor, out: Tensor) -> None:
        """See `Exchange`."""
        self._group.all_gather(own, out, self._subgroups[group])


@final
class ParallelRunner(ModelRunner):
    """The runner of one process. Consecutive processes form a stage of the pipeline, whose layers
    they divide by tensor and expert parallelism.

    An error of one process while the others are at work ends all of them: they would wait for
    messages that never come.
    """

    def __init__(
        self,
        model: Transformer,
        group: ProcessGroup,
        balancing: ExpertBalancing | None = None,
        **options: Any,
    ) -> None:
        """options: those of ModelRunner. Raises UserError if the model does not allow them."""
        super().__init__(model, **options)
        self.group, share = group, model.share
        if share.tensor > 1 and not self.is_batch_invariant:
            raise UserError(
                f"tensor={share.tensor}: rounding in PyTorch depends on the number of rows of a "
                "matrix; divide by pipeline or expert, or use --dtype bf16, which runs on native "
                "kernels"
            )
        self.balancer = None
        if balancing is not None:
            if self._native is None:
                raise UserError("--enable-eplb: needs the native kernels; use --dtype bf16")
            self.balancer = ExpertBalancer(model, self._native, balancing)
        self._size = max(share.tensor, share.experts)
        """Processes of a stage."""
        self._last = range(group.world_size - self._size, group.world_size)
        """The last stage, whose first process sends the results."""
        self._prior, self._next = group.rank - self._size, group.rank + self._size
        if share.is_divided:
            model.use_exchange(GroupExchange(group, share))
        is_grouped = isinstance(model.config.attention, GQAConfig)
        self._cache_parts = share.tensor if is_grouped else 1
        """Processes of a stage with different KV cache entries: MLA's latents are in all."""
        sizes = [int(text) for text in group.gather_texts(str(self.cache.page_bytes))]
        self._page_parts = {rank: sizes[rank] for rank in range(len(sizes)) if self._exports(rank)}
        """Bytes of a KV cache page in the processes that export it."""
        self._is_busy = self._has_ended = False
        if group.is_leader:
            atexit.register(self.end)

    @property
    def layout(self) -> ServingLayout:
        """Sizes of parallelism, with all processes of a stage that divide the experts."""
        share = self.model.share
        stages = self.group.world_size // self._size
        return ServingLayout(tensor=share.tensor, pipeline=stages, expert=share.experts)

    @property
    def balances_experts(self) -> bool:
        return self.balancer is not None

    @property
    def page_bytes(self) -> int:
        return sum(self._page_parts.values())

    # --- the leader ----------------------------------------------------------------------------

    @torch.inference_mode()
    def step(
        self, chunks: Sequence[Chunk]
    ) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "tokens hidden"]]:
        if self.balancer is not None and self.balancer.is_due():
            self._lead(self._record(RecordKind.REBALANCE), self.balancer.rebalance)
        record = self._record(RecordKind.STEP, chunks=chunks)
        return self._lead(record, lambda: self._lead_step(chunks))

    @torch.inference_mode()
    def mtp(
        self, depth: int, hidden: Float[Tensor, "tokens hidden"], chunks: Sequence[Chunk]
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "rows vocab"]]:
        record = self._record(RecordKind.MTP, depth, chunks=chunks)
        return self._lead(record, lambda: self._lead_mtp(depth, hidden, chunks))

    def copy_page(self, source: int, destination: int) -> None:
        record = self._record(RecordKind.COPY_PAGE, source, destination)
        self._lead(record, lambda: super(ParallelRunner, self).copy_page(source, destination))

    def export_page(self, page: int, out: UInt8[Tensor, " page_bytes"]) -> None:
        """The layers of all stages in order, as one process exports them."""
        record = self._record(RecordKind.EXPORT_PAGE, page)
        self._lead(record, lambda: self._lead_export(page, out))

    def import_page(self, page: int, stored: UInt8[Tensor, " page_bytes"]) -> None:
        record = self._record(RecordKind.IMPORT_PAGE, page)
        self._lead(record, lambda: self._lead_import(page, stored))

    def weights_digest(self, own: str) -> str:
        """Process 0's call; the digests of all processes."""
        record = self._record(RecordKind.DIGEST)
        return self._lead(record, lambda: " ".join(self.group.gather_texts(own)))

    def process_stats(self) -> list[ProcessStats]:
        """Stats of all processes in order of their rank; process 0's call."""
        own = self._stats()  # before the record is sent
        record = self._record(RecordKind.STATS)
        texts = self._lead(record, lambda: self.group.gather_texts(own))
        return [ProcessStats(**json.loads(text)) for text in texts]

    def expert_loads(self) -> dict[int, Sequence[int]]:
        """Process 0's call; the loads of all stages."""
        if self.model.config.moe is None or len(self._last) == self.group.world_size:
            return super().expert_loads()
        record = self._record(RecordKind.LOADS)
        texts = self._lead(record, self._gather_loads)
        loads = (json.loads(text) for text in texts)
        return {int(layer): counts for own in loads for layer, counts in own.items()}

    def _gather_loads(self) -> list[str]:
        """The loads of all processes; those of a stage are equal, and its first one reports."""
        is_first = self.group.rank % self._size == 0
        return self.group.gather_texts(json.dumps(super().expert_loads() if is_first else {}))

    def end(self) -> None:
        """End the processes that follow; the runner cannot be used afterwards."""
        if self._has_ended or self.group.has_left:
            return
        self._has_ended = True
        if self._is_busy:  # interrupted between two messages
            return self.group.abandon("process 0 was interrupted")
        self.group.announce(self._record(RecordKind.END).encode())
        self.group.leave()

    def free(self) -> None:
        self.end()
        super().free()

    def _lead_step(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        if self.model.share.is_last:
            return self._compute(chunks)
        sent: list[Sending] = []
        parts = list(self._micro_batches(chunks))
        for part in parts:
            _, rows = self._compute(part)
            sent.append(self.group.send(rows, self._next))
        results = [self._receive_results(part) for part in parts]
        self._wait(sent)
        logits, hidden = zip(*results, strict=True)
        return torch.cat(logits), torch.cat(hidden)

    def _lead_mtp(
        self, depth: int, hidden: Tensor, chunks: Sequence[Chunk]
    ) -> tuple[Tensor, Tensor]:
        sent = [self.group.send(hidden, peer) for peer in self._last if peer != self.group.rank]
        if self.model.share.is_last:
            states, logits = super().mtp(depth, hidden, chunks)
        else:
            logits, states = self._receive_results(chunks)
        self._wait(sent)
        return states, logits

    def _lead_export(self, page: int, out: Tensor) -> None:
        parts = out.split([*self._page_parts.values()])
        for rank, part in zip(self._page_parts, parts, strict=True):
            if rank == self.group.rank:
                super().export_page(page, part)
            else:
                self.group.receive(part, rank)

    def _lead_import(self, page: int, stored: Tensor) -> None:
        parts = stored.split([*self._page_parts.values()])
        by_rank = dict(zip(self._page_parts, parts, strict=True))
        peers = range(1, self.group.world_size)
        sent = [self.group.send(by_rank[self._exporter(peer)], peer) for peer in peers]
        super().import_page(page, by_rank[0])
        self._wait(sent)

    def _receive_results(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor]:
        """Logits and hidden states from the last stage."""
        peer = self._last[0]
        hidden = self._receive_rows(chunks, peer)
        rows = sum(chunk.num_logits for chunk in chunks)
        kind = torch.promote_types(hidden.dtype, torch.float32)
        logits = torch.empty(rows, self.model.config.vocab_size, dtype=kind)
        return self.group.receive(logits, peer), hidden

    def _record(self, kind: RecordKind, *numbers: int, chunks: Sequence[Chunk] = ()) -> StepRecord:
        return StepRecord(
            kind=kind, num_pages=self.allocator.num_pages, numbers=numbers, chunks=chunks
        )

    def _lead(self, record: StepRecord, act: Callable[[], T]) -> T:
        """Announce `record` and do process 0's part of it."""

        def announced() -> T:
            self.group.announce(record.encode())
            return act()

        return self._in_step(announced)

    # --- the others ----------------------------------------------------------------------------

    @torch.inference_mode()
    def follow_leader(self) -> None:
        """Except in process 0: do what process 0 announces, until it ends, then raise
        SystemExit."""
        if self.group.is_leader:
            return
        with ignoring_signals():
            while True:
                record = StepRecord.decode(self.group.receive_record())
                if record.kind == RecordKind.END:
                    break
                if record.num_pages > self.allocator.num_pages:
                    self.allocator.grow(record.num_pages)
                self._in_step(lambda record=record: self._follow(record))
        self.group.leave()
        raise SystemExit(0)

    def _follow(self, record: StepRecord) -> None:
        match record.kind:
            case RecordKind.STEP:
                self._follow_step(record.chunks)
            case RecordKind.MTP if self.model.share.is_last:
                hidden = self._receive_rows(record.chunks, 0)
                states, logits = super().mtp(record.numbers[0], hidden, record.chunks)
                self._wait(self._send_results(logits, states))
            case RecordKind.COPY_PAGE:
                super().copy_page(*record.numbers)
            case RecordKind.EXPORT_PAGE if self._exports(self.group.rank):
                own = torch.empty(self.cache.page_bytes, dtype=torch.uint8)
                super().export_page(record.numbers[0], own)
                self.group.send(own, 0).wait()
            case RecordKind.IMPORT_PAGE:
                own = torch.empty(self.cache.page_bytes, dtype=torch.uint8)
                super().import_page(record.numbers[0], self.group.receive(own, 0))
            case RecordKind.REBALANCE:
                assert self.balancer is not None
                self.balancer.rebalance()
            case RecordKind.LOADS:
                self._gather_loads()
            case RecordKind.DIGEST:
                self.group.gather_texts(weights_digest(self.model))
            case RecordKind.STATS:
                self.group.gather_texts(self._stats())
            case _:  # other processes have the MTP modules, or the same entries
                pass

    def _follow_step(self, chunks: Sequence[Chunk]) -> None:
        """The layers of this stage: rows from the stage before, results to the stage after."""
        share, sent = self.model.share, []
        for part in [chunks] if share.is_first and share.is_last else self._micro_batches(chunks):
            before = None if share.is_first else self._receive_rows(part, self._prior)
            logits, rows = self._compute(part, before)
            if share.is_last:
                sent += self._send_results(logits, rows)
            else:
                sent.append(self.group.send(rows, self._next))
        self._wait(sent)

    def _send_results(self, logits: Tensor, hidden: Tensor) -> list[Sending]:
        """Send the results of the last stage, unless process 0 is in it and has them."""
        if self.group.rank != self._last[0]:
            return []
        return [self.group.send(hidden, 0), self.group.send(logits, 0)]

    # --- all -----------------------------------------------------------------------------------

    def _micro_batches(self, chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
        """Consecutive chunks of a step that run through the stages one after another; results do
        not depend on the division where batches are invariant."""
        total = sum(len(chunk.tokens) for chunk in chunks)
        stages = self.group.world_size // self._size
        count = min(stages, total // MICRO_BATCH_TOKENS, len(chunks))
        if count < 2 or not self.is_batch_invariant:
            yield chunks
            return
        part: list[Chunk] = []
        done = 0
        for chunk in chunks:
            if part and done >= total / count:
                yield part
                part, done = [], 0
            part.append(chunk)
            done += len(chunk.tokens)
        yield part

    def _stats(self) -> str:
        sent = self.group.traffic
        stats = ProcessStats(
            messages=sent.messages,
            bytes=sent.bytes,
            memory=proportional_memory(),
            cpus=sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else [],
        )
        return json.dumps(asdict(stats))

    def _exporter(self, rank: int) -> int:
        """The process that exports the KV cache entries of process `rank`."""
        own = rank % self._size
        return rank - own + own % self._cache_parts

    def _exports(self, rank: int) -> bool:
        return self._exporter(rank) == rank

    def _receive_rows(self, chunks: Sequence[Chunk], peer: int) -> Tensor:
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        width, kind = self.model.config.hidden_size, self.model.embed_tokens.dtype
        return self.group.receive(torch.empty(tokens, width, dtype=kind), peer)

    @staticmethod
    def _wait(sent: Sequence[Sending]) -> None:
        for each in sent:
            each.wait()

    def _in_step(self, act: Callable[[], T]) -> T:
        """The result of `act`; an error ends all processes."""
        self._is_busy = True
        try:
            result = act()
            self._is_busy = False
            return result
        except Exception as error:
            try:
                logger.exception("%s failed", self.group.label)
            finally:  # the log may need memory, too
                self.group.fail(f"{self.group.label} failed: {type(error).__name__}")
