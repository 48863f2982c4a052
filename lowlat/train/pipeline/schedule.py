"""Pipeline schedules: 1F1B, interleaved 1F1B, zero bubble (ZB1P, ZBV) and DualPipeV, run by
torch.distributed.pipelining.

Shapes are passed to PyTorch: its shape inference would run a stage once and send pickles. Deferred
weight gradients come from `StageModule.deferred_work`: PyTorch's own split backward, a second walk
over the graph, computes custom functions twice and fails for a matrix used at several depths of a
stage, such as a tied head or the embedding of MTP modules.
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

from lowlat.train.pipeline.stages import ZERO_BUBBLE, Schedule, StageModule

AnySchedule = (
    Schedule1F1B
    | ScheduleInterleaved1F1B
    | ScheduleInterleavedZeroBubble
    | ScheduleZBVZeroBubble
    | ScheduleDualPipeV
)


class ScheduleShape(NamedTuple):
    """Batch shape of a schedule."""

    micro_batches: int
    tokens: int
    """Of a micro-batch in this process."""


def new_schedule(
    schedule: Schedule,
    modules: Sequence[StageModule],
    shape: ScheduleShape,
    *,
    num_stages: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
) -> AnySchedule:
    """The schedule of this process's stages for batches of `shape`."""
    defers = schedule in ZERO_BUBBLE
    ids = torch.empty(shape.tokens, dtype=torch.int64, device="meta")
    hidden = torch.empty(shape.tokens, hidden_size, dtype=dtype, device="meta", requires_grad=True)
    loss = torch.empty((), device="meta")
    stages = [
        PipelineStage(
            module,
            module.stage.index,
            num_stages,
            device,
            input_args=ids if module.stage.is_first else hidden,
            output_args=loss if module.stage.is_last else hidden,
            group=group,
            dw_builder=module.deferred_work if defers else None,
        )
        for module in modules
    ]
    # Losses are already divided by the targets of the global batch.
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
    """The output of the last stage is its loss."""
    return output
