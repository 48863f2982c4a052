"""A model divided into the stages of a pipeline: which layers are where, and one stage as a module.

Owns what a process keeps of the model. When which stage works on which micro-batch is
`pipeline_schedule`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowlat.config.model import ModelConfig
from lowlat.model.linear import Linear
from lowlat.model.moe import StackedExperts
from lowlat.model.transformer import Transformer
from lowlat.plan.flops import head_flops, layer_work, mtp_work
from lowlat.plan.job import ParallelLayout
from lowlat.plan.stages import PipelineStage, cut, held
from lowlat.train.parallel.expert import DividedExperts
from lowlat.train.parallel.view import View
from lowlat.train.step.loss import head_losses

Schedule = Literal["1f1b", "interleaved", "zb", "zbv", "dualpipev"]
"""1F1B; interleaved 1F1B with two stages per process (arXiv 2104.04473); ZB1P and ZBV (arXiv
2401.10241); DualPipeV (DeepSeek-V3 section 3.2.1, folded so that a process has two stages of one
pipeline instead of one of each of two).
"""
FOLDED: tuple[Schedule, ...] = ("zbv", "dualpipev")
"""Schedules that begin and end in the same process."""
_PLANNED = {
    "1f1b": "1f1b",
    "interleaved": "interleaved",
    "zb": "zb1p",
    "zbv": "dualpipev",
    "dualpipev": "dualpipev",
}
"""Schedules of `plan` that lay out stages alike."""

ZERO_BUBBLE: tuple[Schedule, ...] = ("zb", "zbv", "dualpipev")
"""Schedules with a place of its own for the gradients of weights."""

EMBEDDING = "embed_tokens.weight"


def planned(schedule: Schedule, size: int) -> ParallelLayout:
    """The division of layers among `size` processes, as `plan` spells it."""
    return ParallelLayout(pipeline=size, schedule=_PLANNED[schedule])  # pyright: ignore[reportArgumentType]


def divide(
    config: ModelConfig, schedule: Schedule, size: int, sequence_length: int
) -> list[list[PipelineStage]]:
    """Every process's stages, in order of the pipeline: the busiest process is as little busy as it
    can be in sequences of `sequence_length` tokens. There must be as many layers, head included, as
    stages.
    """
    costs = [
        layer_work(config, layer, sequence_length).total
        for layer in range(config.num_hidden_layers)
    ]
    tail = head_flops(config) + sum(
        mtp_work(config, depth, sequence_length).total
        for depth in range(config.num_nextn_predict_layers)
    )
    layout = planned(schedule, size)
    return held(cut(config, layout, (*costs, tail)), layout)


def needs_embedding(config: ModelConfig, stage: PipelineStage) -> bool:
    """Whether `stage` uses the embedding matrix: to embed, as its head, or for MTP modules."""
    ahead = config.num_nextn_predict_layers > 0 and not config.mtp_copies
    return stage.is_first or (stage.is_last and (config.tie_word_embeddings or ahead))


class Elsewhere(nn.Module):
    """Stands where the model has a part that another process holds."""


def holders_of_embedding(
    config: ModelConfig, division: Sequence[Sequence[PipelineStage]]
) -> list[int]:
    """Processes that use the embedding matrix: the first, and another one at most."""
    return [
        process
        for process, stages in enumerate(division)
        if any(needs_embedding(config, stage) for stage in stages)
    ]


def keep_own(model: Transformer, stages: Sequence[PipelineStage]) -> None:
    """Leave in `model` only what `stages` need; what stays keeps its name."""
    own = {layer for stage in stages for layer in stage.layers}
    for layer in range(len(model.layers)):
        if layer not in own:
            model.layers[layer] = Elsewhere()
    if not any(stage.is_last for stage in stages):
        model.add_module("norm", Elsewhere())
        model.lm_head = None
        model.mtp = nn.ModuleList()
    if not any(needs_embedding(model.config, stage) for stage in stages):
        model.add_module("embed_tokens", Elsewhere())


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a stage computes in one step."""

    views: Sequence[View]
    """The micro-batches."""
    targets: Sequence[int]
    """Of the global batch, per head."""
    mtp_weight: float
    """Lambda."""
    z_weight: float
    """Weight of the z-loss."""


@final
class StageModule(nn.Module):
    """One stage: its parameters are those it uses, the embedding of a head or of MTP modules
    included. The last stage ends in the loss.
    """

    def __init__(self, model: Transformer, stage: PipelineStage, dtype: torch.dtype) -> None:
        """`model` has at least what `stage` needs; activations have `dtype`."""
        super().__init__()
        self.stage = stage
        self.layers = nn.ModuleList(model.layers[layer] for layer in stage.layers)
        self.embed_tokens = model.embed_tokens if needs_embedding(model.config, stage) else None
        self.norm = model.norm if stage.is_last else None
        self.lm_head = model.lm_head if stage.is_last else None
        self.mtp = model.mtp if stage.is_last else None
        self.work: Work | None = None
        """What forward passes are about; set before every step."""
        self.sums = torch.zeros(0, dtype=torch.float64)
        """On the last stage, as `Passes.backward` gives them."""
        self._dtype = dtype
        self._rotary = model.rotary
        # Not a child: its names and parameters are not those of this stage.
        self._head_losses = partial(head_losses, model)
        self._deferred: list[Callable[[], None]] = []

    def begin(self, work: Work) -> None:
        """Forget the last step; forward passes are about `work` from here on."""
        self.work = work
        self.sums = torch.zeros(len(work.targets) + 1, dtype=torch.float64)

    def defer(self) -> None:
        """Let backward passes leave the gradients of large matrices to `deferred_work`.

        Those of norms, gates, the embedding and of matrices that are used otherwise than by their
        module's forward pass stay part of them: they are small, but for the head's, which the loss
        makes on its way.
        """
        for module in self.modules():
            if isinstance(module, Linear | StackedExperts | DividedExperts):
                module.later = self._later

    def deferred_work(self) -> Callable[[], None]:
        """What the backward passes since the last call left to do."""
        work, self._deferred = self._deferred, []
        return partial(_run_all, work)

    def _later(self, work: Callable[[], None]) -> None:
        self._deferred.append(work)

    def forward(
        self, x: Int[Tensor, "tokens"] | Float[Tensor, "tokens hidden"], place: Int[Tensor, "one"]
    ) -> Float[Tensor, "..."]:
        """Hidden states of micro-batch `place`, of the last stage its loss; the first takes ids."""
        assert self.work is not None
        batch, attention, positions = self.work.views[int(place)]
        if self.stage.is_first:
            assert self.embed_tokens is not None
            x = self.embed_tokens(x).to(self._dtype)
        tables = self._rotary(positions)
        for number, layer in zip(self.stage.layers, self.layers, strict=True):
            x = layer(x, self._rotary.of(number, tables), attention)
        if self.norm is None:
            return x
        loss = self._head_losses(
            self.norm(x),
            batch,
            attention,
            positions,
            targets=self.work.targets,
            mtp_weight=self.work.mtp_weight,
            z_weight=self.work.z_weight,
        )
        self.sums += torch.cat([loss.heads, loss.z[None]]).double().cpu()
        return loss.total


def _run_all(work: Sequence[Callable[[], None]]) -> None:
    for one in work:
        one()
