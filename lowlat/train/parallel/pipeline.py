"""Passes of a model whose layers are divided among processes: micro-batches run through a pipeline.

Owns the step of a pipeline: micro-batches in, sums and gradients out, as `passes.PlainPasses` in
one process. Stages are `pipeline_stages`', orders `pipeline_schedule`'s.
"""

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
from lowlat.train.parallel.pipeline_schedule import AnySchedule, Shape, new_schedule
from lowlat.train.parallel.pipeline_stages import (
    EMBEDDING,
    Schedule,
    StageModule,
    Work,
    divide,
    holders_of_embedding,
    keep_own,
)
from lowlat.train.parallel.relay import AXIS
from lowlat.train.parallel.team import Team
from lowlat.train.parallel.view import View, own_view
from lowlat.train.recipe.schedule import StepPlan
from lowlat.train.step.passes import Passes


@final
class PipelinePasses(Passes):
    """This process's stages of a model, one pipeline with those of its neighbours.

    The embedding is wanted at both ends where the head is tied to it or MTP modules embed with it.
    Then first and last stage both hold it and sum their gradients, as Megatron-LM does; with a
    folded pipeline (zbv, dualpipev) both stages are in one process, which is why DeepSeek-V3 puts
    them there (section 3.2.1, memory saving).
    """

    def __init__(
        self, model: Transformer, team: Team, *, dtype: torch.dtype, sequence_length: int
    ) -> None:
        """Take out of `model`, which is whole and not laid out yet, what other processes hold.

        dtype: of activations; sequence_length: for which stages are balanced.
        """
        schedule: Schedule = team.parallel.pipeline_schedule
        place = team.place(AXIS)
        division = divide(model.config, schedule, team.size(AXIS), sequence_length)
        keep_own(model, division[place])
        self.modules = [StageModule(model, stage, dtype) for stage in division[place]]
        holders = holders_of_embedding(model.config, division)
        self._partner = _partner(holders, place)
        self.copies = frozenset({EMBEDDING} if place in holders[1:] else ())
        """Parameters that another process has as well, whose they count as."""
        self._model = model
        self._dtype = dtype
        self._team = team
        self._name: Schedule = schedule
        self._process = {stage.index: i for i, own in enumerate(division) for stage in own}
        self._made: tuple[Shape, AnySchedule] | None = None
        # Where a process fails, the others would each log their whole schedule.
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)

    def backward(
        self, batch: Batch, plan: StepPlan, targets: Sequence[int]
    ) -> Float[Tensor, "heads_and_z"]:
        parts = batch.split(plan.phase.micro_batch_size)
        views = [own_view(self._team, part, len(targets)) for part in parts]
        work = Work(
            views=views,
            targets=targets,
            mtp_weight=plan.mtp_weight,
            z_weight=plan.phase.z_weight,
        )
        for module in self.modules:
            module.begin(work)
        schedule = self._schedule(Shape(len(views), len(views[0].positions)))
        with self._shared_embedding():
            self._run(schedule, views)
        return self._team.sum(self._sums(), (AXIS,))

    @torch.no_grad()
    def likelihood(self, batch: Batch) -> Float[Tensor, "heads"]:
        num_ahead = 1 + self._model.config.num_nextn_predict_layers
        view = own_view(self._team, batch, num_ahead)
        work = Work(views=[view], targets=[1] * num_ahead, mtp_weight=0.0, z_weight=0.0)
        place = torch.zeros(1, dtype=torch.int64)
        x = _ids([view], num_ahead)
        for module in self.modules:
            module.begin(work)
            x = module(self._received(x, module.stage, len(view.positions)), place)
            self._send(x, module.stage)
        return self._sums()[:-1]

    def _sums(self) -> Tensor:
        """What the stages summed up; zeros without the last one."""
        sums = torch.stack([module.sums for module in self.modules]).sum(dim=0)
        for module in self.modules:
            module.work = None
        return sums

    def _received(self, x: Tensor, stage: PipelineStage, tokens: int) -> Tensor:
        """Input of `stage`, where `x` is what this process had last."""
        source = self._process.get(stage.index - 1)
        if source is None or source == self._process[stage.index]:
            return x
        shape = tokens, self._model.config.hidden_size
        out = torch.empty(shape, dtype=self._dtype, device=self._team.device)
        dist.recv(out, group=self._team.group(AXIS), group_src=source)
        return out

    def _send(self, x: Tensor, stage: PipelineStage) -> None:
        destination = self._process.get(stage.index + 1)
        if destination is not None and destination != self._process[stage.index]:
            dist.send(x.contiguous(), group=self._team.group(AXIS), group_dst=destination)

    def _run(self, schedule: AnySchedule, views: Sequence[View]) -> None:
        """Feed the micro-batches: ids to the first stage, to every stage which one it is."""
        places = torch.arange(len(views))
        num_ahead = 1 + self._model.config.num_nextn_predict_layers
        is_first = any(module.stage.is_first for module in self.modules)
        is_last = any(module.stage.is_last for module in self.modules)
        try:
            schedule.step(
                *([_ids(views, num_ahead)] if is_first else []),
                target=places if is_last else None,
                place=places,
                return_outputs=False,
            )
        except RuntimeError as error:
            # PyTorch wraps errors of a stage in a list of its tensors.
            raise error.__cause__ or error from None

    def _schedule(self, shape: Shape) -> AnySchedule:
        """The schedule for batches of `shape`; made again where a ramp or a phase changes it."""
        if self._made is None or self._made[0] != shape:
            made = new_schedule(
                self._name,
                self.modules,
                shape,
                num_stages=len(self._process),
                hidden_size=self._model.config.hidden_size,
                dtype=self._dtype,
                device=torch.device(self._team.device),
                group=self._team.group(AXIS),
            )
            self._made = shape, made
        return self._made[1]

    @contextmanager
    def _shared_embedding(self) -> Iterator[None]:
        """Sum the gradient that the body gives the embedding over both processes that hold it."""
        if self._partner is None:
            yield
            return
        weight = self._model.embed_tokens.weight
        before, weight.grad = weight.grad, None
        yield
        assert weight.grad is not None
        _exchange_sum(weight.grad, self._partner, self._team.group(AXIS))
        if before is not None:
            weight.grad += before


def _ids(views: Sequence[View], num_ahead: int) -> Int[Tensor, "tokens"]:
    """Input ids of micro-batches, one after the other."""
    batches = [view.batch for view in views]
    return torch.cat([b.tokens[:, : b.sequence_length(num_ahead)].flatten() for b in batches])


def _partner(holders: Sequence[int], place: int) -> int | None:
    """The other process that holds the embedding, where this one does."""
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
