"""Pipeline stages: the division of a model's layers among processes, and one stage as a module."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowlat.config.model import ModelConfig
from lowlat.model.share import RemoteModule
from lowlat.model.transformer import Transformer
from lowlat.plan.flops import head_flops, layer_work, mtp_work
from lowlat.plan.job import ParallelLayout
from lowlat.plan.stages import PipelineStage, cut, held
from lowlat.train.cost.dry_run import layout_of
from lowlat.train.layers.deferred import defer_weight_gradients
from lowlat.train.parallel.local_batch import LocalBatch
from lowlat.train.recipe.schema import ParallelConfig
from lowlat.train.step.loss import head_losses

Schedule = Literal["1f1b", "interleaved", "zb", "zbv", "dualpipev"]
"""1F1B; interleaved 1F1B with two stages per process (arXiv 2104.04473); ZB1P and ZBV (arXiv
2401.10241); DualPipeV (DeepSeek-V3 section 3.2.1, folded so that a process has two stages of one
pipeline instead of one of each of two).
"""
FOLDED: tuple[Schedule, ...] = ("zbv", "dualpipev")
"""Schedules whose first and last stage are in the same process."""
ZERO_BUBBLE: tuple[Schedule, ...] = ("zb", "zbv", "dualpipev")
"""Schedules that compute weight gradients apart from activation gradients."""

EMBEDDING = "embed_tokens.weight"


def planned(schedule: Schedule, size: int) -> ParallelLayout:
    """The pipeline layout of `size` processes in the terms of `plan`."""
    return layout_of(ParallelConfig(pipeline=size, pipeline_schedule=schedule))


def divide(
    config: ModelConfig, schedule: Schedule, size: int, sequence_length: int
) -> list[list[PipelineStage]]:
    """Stages of each process, in pipeline order, balanced for sequences of `sequence_length`
    tokens.

    The model must have at least as many units of layers (`ModelConfig.layer_units`), head included,
    as stages.
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
    """Whether `stage` uses the embedding matrix: for tokens, as a tied head, or for MTP modules."""
    ahead = config.num_nextn_predict_layers > 0 and not config.mtp_copies
    return stage.is_first or (stage.is_last and (config.tie_word_embeddings or ahead))


def holders_of_embedding(
    config: ModelConfig, division: Sequence[Sequence[PipelineStage]]
) -> list[int]:
    """Processes that use the embedding matrix: the first, and at most one other."""
    return [
        process
        for process, stages in enumerate(division)
        if any(needs_embedding(config, stage) for stage in stages)
    ]


def keep_stages(model: Transformer, stages: Sequence[PipelineStage]) -> None:
    """Remove from `model` all modules that `stages` do not need; parameter names do not change."""
    own = {layer for stage in stages for layer in stage.layers}
    for layer in range(len(model.layers)):
        if layer not in own:
            model.layers[layer] = RemoteModule()
    if not any(stage.is_last for stage in stages):
        model.add_module("norm", RemoteModule())
        model.lm_head = None
        model.mtp = nn.ModuleList()
    if not any(needs_embedding(model.config, stage) for stage in stages):
        model.add_module("embed_tokens", RemoteModule())


@dataclass(frozen=True, kw_only=True, slots=True)
class StageInputs:
    """The micro-batches and loss weights of one optimizer step."""

    micro_batches: Sequence[LocalBatch]
    targets: Sequence[int]
    """Number of targets of the global batch, per head."""
    mtp_weight: float
    """Weight of the MTP loss (lambda)."""
    z_weight: float
    """Weight of the z-loss."""
    is_warmup: bool = False
    """Warm-up of indexers, without losses of heads."""


@final
class StageModule(nn.Module):
    """One pipeline stage with the parameters it uses, including the embedding of a tied head or of
    MTP modules. The last stage computes the loss.
    """

    def __init__(
        self, model: Transformer, stage: PipelineStage, dtype: torch.dtype, *, defers: bool = False
    ) -> None:
        """`model` has at least the modules of `stage`; activations have `dtype`. With `defers`,
        `deferred_work` computes weight gradients, for zero-bubble schedules.
        """
        super().__init__()
        self.stage = stage
        self.layers = nn.ModuleList(model.layers[layer] for layer in stage.layers)
        self.embed_tokens = model.embed_tokens if needs_embedding(model.config, stage) else None
        self.norm = model.norm if stage.is_last else None
        self.lm_head = model.lm_head if stage.is_last else None
        self.mtp = model.mtp if stage.is_last else None
        self.inputs: StageInputs | None = None
        """Of the current step; set before its first forward pass."""
        self.sums = torch.zeros(0, dtype=torch.float64)
        """On the last stage, the sums that `Passes.backward` returns."""
        self._dtype = dtype
        self._rotary = model.rotary
        # Not a child: its names and parameters are not those of this stage.
        self._head_losses = partial(head_losses, model)
        self._deferred: list[Callable[[], None]] = []
        if defers:
            # Linear layers and experts only: the backward pass still computes the gradients of
            # norms, gates and the embedding, which are small, and the fused cross entropy that of
            # the head in the forward pass.
            for part in (self.layers, self.mtp):
                if part is not None:
                    defer_weight_gradients(part, self._deferred.append)

    def begin(self, inputs: StageInputs) -> None:
        """Start a step: forward passes compute micro-batches of `inputs`."""
        self.inputs = inputs
        self.sums = torch.zeros(len(inputs.targets) + 1, dtype=torch.float64)

    def deferred_work(self) -> Callable[[], None]:
        """A function that computes the weight gradients deferred since the last call."""
        work = self._deferred.copy()
        self._deferred.clear()
        return partial(_run_all, work)

    def forward(
        self, x: Int[Tensor, "tokens"] | Float[Tensor, "tokens hidden"], place: Int[Tensor, "one"]
    ) -> Float[Tensor, "..."]:
        """Hidden states of micro-batch `place`, or on the last stage its loss; `x` are ids on the
        first stage.
        """
        assert self.inputs is not None
        batch, attention, positions = self.inputs.micro_batches[int(place)]
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
            targets=self.inputs.targets,
            mtp_weight=self.inputs.mtp_weight,
            z_weight=self.inputs.z_weight,
            is_warmup=self.inputs.is_warmup,
        )
        self.sums += torch.cat([loss.heads, loss.z[None]]).double().cpu()
        return loss.total


def _run_all(work: Sequence[Callable[[], None]]) -> None:
    for one in work:
        one()
