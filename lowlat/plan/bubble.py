"""Pipeline bubble: idle time per step (DeepSeek-V3 table 2; interleaved: arXiv 2104.04473).

F is the forward time of a stage for one micro-batch, B the backward time with the weights'
gradients, W the part of B for the weights' gradients, F&B the time of an overlapped forward and
backward pass.
"""

from dataclasses import dataclass

from lowlat.plan.job import ParallelLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTimes:
    """Seconds of one device for one micro-batch, over all its stages (with DualPipe a micro-batch
    runs through one of the two)."""

    forward: float
    """F."""
    backward: float
    """B."""
    weights: float
    """W."""
    overlapped: float
    """F&B; F + B without overlap."""


def bubble_seconds(layout: ParallelLayout, times: StageTimes) -> float:
    """Idle seconds of a device per step while the pipeline fills and drains."""
    pipeline = layout.pipeline
    if pipeline == 1:
        return 0.0
    forward, backward, weights = times.forward, times.backward, times.weights
    if layout.schedule == "1f1b":
        return (pipeline - 1) * (forward + backward)
    if layout.schedule == "interleaved":
        return (pipeline - 1) * (forward + backward) / layout.stages_per_device
    if layout.schedule == "zb1p":
        return (pipeline - 1) * max(0.0, forward + backward - 2 * weights)
    idle = times.overlapped + backward - 3 * weights
    # DualPipeV on p devices is DualPipe with 2p stages of half the size.
    stages = pipeline / 2 - 1 if layout.schedule == "dualpipe" else (pipeline - 1) / 2
    return stages * max(0.0, idle)


def in_flight(layout: ParallelLayout, micro_batches: int, stage: int) -> float:
    """Maximum number of micro-batches whose activations of stage `stage` are live at once.

    With DualPipe it is PP - stage, which is PP + 1 for the two stages of a device together.
    """
    pipeline, per_device = layout.pipeline, layout.stages_per_device
    if pipeline == 1:
        return 1.0
    rank = stage % pipeline
    most = {
        "1f1b": pipeline - rank,
        "zb1p": pipeline,
        "interleaved": pipeline + (pipeline - 1 - 2 * rank) / per_device,
        "dualpipe": layout.num_stages - stage,
        "dualpipev": layout.num_stages - stage,
    }[layout.schedule]
    return min(float(micro_batches), float(most))
