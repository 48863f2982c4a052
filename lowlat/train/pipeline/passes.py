"""Pipeline parallelism: forward and backward passes of micro-batches through a model's stages."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import final

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from lowlat.data.batch import Batch
from lowlat.model.transformer import Transformer
from lowlat.plan.stages import PipelineStage
from lowlat.train.parallel.local_batch import LocalBatch, local_batch
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.pipeline_gather import AXIS
from lowlat.train.pipeline.schedule import AnySchedule, ScheduleShape, new_schedule
from lowlat.train.pipeline.stages import (
    EMBEDDING,
    ZERO_BUBBLE,
    Schedule,
    StageInputs,
    StageModule,
    divide,
    holders_of_embedding,
    keep_stages,
)
from lowlat.train.recipe.schedule import StepPlan
from lowlat.train.step.passes import Passes


@final
class PipelinePasses(Passes):
    """This process's stages of a model, one pipeline with those of its neighbours.

    With a tied head or MTP modules both ends use the embedding. Then the first and the last stage
    hold it and sum their gradients, as in Megatron-LM; with a folded pipeline (zbv, dualpipev) both
    stages are in one process, which is why DeepSeek-V3 puts them there (section 3.2.1, memory
    saving).
    """

    def __init__(
        self, model: Transformer, mesh: ProcessMesh, *, dtype: torch.dtype, sequence_length: int
    ) -> None:
        """Remove from `model`, which is complete and not parallelized yet, the stages of others.

        dtype: of activations; sequence_length: of the sequences that stages are balanced for.
        """
        schedule: Schedule = mesh.parallel.pipeline_schedule
        place = mesh.local_rank(AXIS)
        division = divide(model.config, schedule, mesh.size(AXIS), sequence_length)
        keep_stages(model, division[place])
        defers = schedule in ZERO_BUBBLE
        self.modules = [
            StageModule(model, stage, dtype, defers=defers) for stage in division[place]
        ]
        holders = holders_of_embedding(model.config, division)
        self._partner = _partner(holders, place)
        self.copies = frozenset({EMBEDDING} if place in holders[1:] else ())
        """Parameters that another process also has, and which only that process counts."""
        self._model = model
        self._dtype = dtype
        self._mesh = mesh
        self._name: Schedule = schedule
        self._process = {stage.index: i for i, own in enumerate(division) for stage in own}
        self._made: tuple[ScheduleShape, AnySchedule] | None = None
        # After a failure every other process would log its whole schedule.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)

    def backward(
        self, batch: Batch, plan: StepPlan, targets: Sequence[int]
    ) -> Float[Tensor, "heads_and_z"]:
        parts = batch.split(plan.phase.micro_batch_size)
        micro_batches = [self._local(part, len(targets)) for part in parts]
        inputs = StageInputs(
            micro_batches=micro_batches,
            targets=targets,
            mtp_weight=plan.mtp_weight,
            z_weight=plan.phase.z_weight,
            is_warmup=plan.phase.is_warmup,
        )
        for module in self.modules:
            module.begin(inputs)
        schedule = self._schedule(
            ScheduleShape(len(micro_batches), len(micro_batches[0].positions))
        )
        with self._shared_embedding():
            self._run(schedule, micro_batches)
        return self._mesh.sum(self._sums(), (AXIS,))

    @torch.no_grad()
    def likelihood(self, batch: Batch) -> Float[Tensor, "heads"]:
        num_ahead = 1 + self._model.config.num_nextn_predict_layers
        whole = self._local(batch, num_ahead)
        inputs = StageInputs(
            micro_batches=[whole], targets=[1] * num_ahead, mtp_weight=0.0, z_weight=0.0
        )
        place = torch.zeros(1, dtype=torch.int64)
        x = _ids([whole], num_ahead)
        for module in self.modules:
            module.begin(inputs)
            x = module(self._received(x, module.stage, len(whole.positions)), place)
            self._send(x, module.stage)
        return self._sums()[:-1]

    def _local(self, batch: Batch, num_ahead: int) -> LocalBatch:
        is_sparse = self._model.config.is_sparse
        return local_batch(self._mesh, batch, num_ahead, is_sparse=is_sparse)

    def _sums(self) -> Tensor:
        """The sums of the last stage; zeros without it."""
        sums = torch.stack([module.sums for module in self.modules]).sum(dim=0)
        for module in self.modules:
            module.inputs = None
        return sums

    def _received(self, x: Tensor, stage: PipelineStage, tokens: int) -> Tensor:
        """Input of `stage`: received, or `x`, the output of this process's previous stage."""
        source = self._process.get(stage.index - 1)
        if source is None or source == self._process[stage.index]:
            return x
        shape = tokens, self._model.config.hidden_size
        out = torch.empty(shape, dtype=self._dtype, device=self._mesh.device)
        dist.recv(out, group=self._mesh.group(AXIS), group_src=source)
        return out

    def _send(self, x: Tensor, stage: PipelineStage) -> None:
        destination = self._process.get(stage.index + 1)
        if destination is not None and destination != self._process[stage.index]:
            dist.send(x.contiguous(), group=self._mesh.group(AXIS), group_dst=destination)

    def _run(self, schedule: AnySchedule, micro_batches: Sequence[LocalBatch]) -> None:
        """Run the micro-batches: ids go to the first stage, their index to every stage."""
        places = torch.arange(len(micro_batches))
        num_ahead = 1 + self._model.config.num_nextn_predict_layers
        is_first = any(module.stage.is_first for module in self.modules)
        is_last = any(module.stage.is_last for module in self.modules)
        try:
            schedule.step(
                *([_ids(micro_batches, num_ahead)] if is_first else []),
                target=places if is_last else None,
                place=places,
                return_outputs=False,
            )
        except RuntimeError as error:
            # PyTorch wraps errors of a stage in a list of its tensors.
            raise error.__cause__ or error from None

    def _schedule(self, shape: ScheduleShape) -> AnySchedule:
        """The schedule for batches of `shape`, rebuilt when a ramp or a phase changes it."""
        if self._made is None or self._made[0] != shape:
            made = new_schedule(
                self._name,
                self.modules,
                shape,
                num_stages=len(self._process),
                hidden_size=self._model.config.hidden_size,
                dtype=self._dtype,
                device=torch.device(self._mesh.device),
                group=self._mesh.group(AXIS),
            )
            self._made = shape, made
        return self._made[1]

    @contextmanager
    def _shared_embedding(self) -> Iterator[None]:
        """Sum the gradient of a trained embedding over both processes that hold it."""
        weight = self._model.embed_tokens.weight if self._partner is not None else None
        if self._partner is None or weight is None or not weight.requires_grad:
            yield
            return
        before, weight.grad = weight.grad, None
        yield
        assert weight.grad is not None
        _exchange_sum(weight.grad, self._partner, self._mesh.group(AXIS))
        if before is not None:
            weight.grad += before


def _ids(micro_batches: Sequence[LocalBatch], num_ahead: int) -> Int[Tensor, "tokens"]:
    """Concatenated input ids of micro-batches."""
    batches = [part.batch for part in micro_batches]
    return torch.cat([b.tokens[:, : b.sequence_length(num_ahead)].flatten() for b in batches])


def _partner(holders: Sequence[int], place: int) -> int | None:
    """The other process with the embedding, if this process has it."""
    others = [holder for holder in holders if holder != place]
    return others[0] if place in holders and others else None


def _exchange_sum(gradient: Tensor, peer: int, group: dist.ProcessGroup) -> None:
    """Replace `gradient` by its sum with that of process `peer` of `group`, in place."""
    own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    own = own.contiguous()
    other = torch.empty_like(own)
    operations = [
        dist.P2POp(dist.isend, own, group=group, group_peer=peer),
        dist.P2POp(dist.irecv, other, group=group, group_peer=peer),
    ]
    for one in dist.batch_isend_irecv(operations):
        one.wait()
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    local += other
