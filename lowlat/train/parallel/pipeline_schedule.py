"""Orders of forward and backward passes along a pipeline: PyTorch's schedules, what they ask for.

Owns how stages become a schedule. Shapes are given, never found by a first run, whose results would
travel as pickles. What a zero-bubble schedule does later is `StageModule.deferred_work`: PyTorch's
own way, a second walk over the graph, computes custom functions twice and fails where a matrix is
used at several depths of a stage, as a tied head's and MTP modules' is.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from lowlat.train.parallel.pipeline_stages import ZERO_BUBBLE, Schedule, StageModule

AnySchedule = (
    Schedule1F1B
    | ScheduleInterleaved1F1B
    | ScheduleInterleavedZeroBubble
    | ScheduleZBVZeroBubble
    | ScheduleDualPipeV
)


class Shape(NamedTuple):
    """What a schedule is made for."""

    micro_batches: int
    tokens: int
    """Of a micro-batch in this process."""


def new_schedule(
    schedule: Schedule,
    modules: Sequence[StageModule],
    shape: Shape,
    *,
    num_stages: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> AnySchedule:
    """The schedule of this process's stages for batches of `shape`."""
    defers = schedule in ZERO_BUBBLE
    if defers:
        for module in modules:
            module.defer()
    stages = [
        PipelineStage(
            module,
            module.stage.index,
            num_stages,
            device,
            input_args=_given(module, shape.tokens, hidden_size, dtype),
            output_args=_made(module, shape.tokens, hidden_size, dtype),
            group=group,
            dw_builder=module.deferred_work if defers else None,
        )
        for module in modules
    ]
    # Losses are divided by the targets of the global batch already.
    count = shape.micro_batches
    if schedule == "1f1b":
        return Schedule1F1B(stages[0], count, loss_fn=_loss, scale_grads=False)
    kind = {
        "interleaved": ScheduleInterleaved1F1B,
        "zb": ScheduleInterleavedZeroBubble,
        "zbv": ScheduleZBVZeroBubble,
        "dualpipev": ScheduleDualPipeV,
    }[schedule]
    return kind(cast(list, stages), count, loss_fn=_loss, scale_grads=False)


def _loss(output: Tensor, _target: Tensor) -> Tensor:
    """What the last stage gives is its loss already."""
    return output


def _given(module: StageModule, tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    if module.stage.is_first:
        return torch.empty(tokens, dtype=torch.int64, device="meta")
    return _hidden(tokens, hidden_size, dtype)


def _made(module: StageModule, tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    if module.stage.is_last:
        return torch.empty((), device="meta")
    return _hidden(tokens, hidden_size, dtype)


def _hidden(tokens: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(tokens, hidden_size, dtype=dtype, device="meta", requires_grad=True)
