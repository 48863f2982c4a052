"""Cost model of a training step: time of computation, communication, pipeline bubble, gradient
synchronization and optimizer update.

All values are of the slowest device of a pipeline.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lowlat.config.model import ModelConfig
from lowlat.plan.activations import FP32_BYTES, all_bytes
from lowlat.plan.bubble import StageTimes, bubble_seconds
from lowlat.plan.flops import (
    ForwardFlops,
    head_flops,
    layer_work,
    mtp_work,
    recomputed_work,
    token_flops,
)
from lowlat.plan.job import BIDIRECTIONAL, TrainingJob, check
from lowlat.plan.machine import Machine
from lowlat.plan.memory import MemoryEstimate, cast_bytes, device_memory, moment_bytes, shares
from lowlat.plan.stages import PipelineStage, cut, device_parameters, held, stage_work
from lowlat.plan.traffic import COMBINE, DISPATCH, Transfer, transfers


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step by part."""

    compute: float
    """Forward, backward and recomputation."""
    traffic: float
    """Transfers that do not overlap with computation, and the slowdown from those that do."""
    bubble: float
    """Pipeline fill and drain."""
    synchronisation: float
    """Gradients and weights, once per step; assumed not to overlap."""
    update: float
    """Optimizer update, bound by memory bandwidth."""

    @property
    def total(self) -> float:
        return self.compute + self.traffic + self.bubble + self.synchronisation + self.update


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Memory, time and traffic of training `job` on `machine`."""

    job: TrainingJob
    machine: Machine
    memory: MemoryEstimate
    time: StepTime
    transfers: list[Transfer]
    """Transfers of the slowest device."""
    training_flops: float
    """FLOPs per token without recomputation."""
    rank: int
    """Pipeline rank of the slowest device."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.machine.usable_bytes

    @property
    def network_bytes(self) -> float:
        """Bytes a device sends to other nodes per step."""
        return sum((transfer.network_bytes for transfer in self.transfers), 0.0)

    @property
    def bubble_share(self) -> float:
        return self.time.bubble / self.time.total

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of all devices."""
        return self.job.tokens / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization: share of the published bf16 rate (in fp32, of the fp32 rate),
        with causal attention FLOPs.
        """
        rate = self.machine.flops["fp32" if self.job.precision == "fp32" else "bf16"]
        return self.training_flops * self.tokens_per_second / rate / self.job.layout.devices

    def device_hours(self, tokens: float) -> float:
        return tokens / self.tokens_per_second * self.job.layout.devices / 3600


def estimate(config: ModelConfig, job: TrainingJob, machine: Machine) -> Estimate:
    """Estimate the cost of `job`. Raises UserError for an impossible layout; `Estimate.fits` is
    false if memory does not suffice.
    """
    check(config, job)
    devices, memory = divided(config, job, machine)
    return timed(config, job, machine, devices, memory)


def divided(
    config: ModelConfig, job: TrainingJob, machine: Machine
) -> tuple[list[list[PipelineStage]], MemoryEstimate]:
    """The stages of every device along a pipeline, and the largest memory of a device.

    Stages are balanced by time, or by number of layers (of units of layers that stay together) if
    that does not fit.
    """
    layout, costs = job.layout, _costs(config, job, machine)
    devices = held(cut(config, layout, costs), layout)
    memory = device_memory(config, job, devices)
    if memory.total <= machine.usable_bytes or layout.num_stages == 1:
        return devices, memory
    most = -(-len(config.layer_units()) // layout.num_stages)
    even = held(cut(config, layout, costs, most), layout)
    even_memory = device_memory(config, job, even)
    if even_memory.total < memory.total:
        return even, even_memory
    return devices, memory


def _costs(config: ModelConfig, job: TrainingJob, machine: Machine) -> tuple[float, ...]:
    """Forward seconds per token of every decoder layer, then of head and MTP modules."""
    length = job.sequence_length
    costs = [
        _product_seconds(job, machine, layer_work(config, layer, length))
        + _pass_seconds(machine, all_bytes(config, layer, job, selective=False).values())
        for layer in range(config.num_hidden_layers)
    ]
    tail = ForwardFlops(plain=head_flops(config))
    for depth in range(config.num_nextn_predict_layers):
        tail += mtp_work(config, depth, length)
    return (*costs, _product_seconds(job, machine, tail))


def timed(
    config: ModelConfig,
    job: TrainingJob,
    machine: Machine,
    devices: list[list[PipelineStage]],
    memory: MemoryEstimate,
) -> Estimate:
    """The estimate for given stages and memory."""
    steps: dict[object, tuple[StepTime, list[Transfer]]] = {}
    times = []
    for stages in devices:
        # Devices with equal numbers of layers of each kind take the same time.
        key = _anonymous(config, stages)
        if key not in steps:
            steps[key] = _step(config, job, machine, stages)
        times.append(steps[key])
    rank = max(range(len(times)), key=lambda index: times[index][0].total)
    return Estimate(
        job=job,
        machine=machine,
        memory=memory,
        time=times[rank][0],
        transfers=times[rank][1],
        training_flops=token_flops(config, job.sequence_length).training,
        rank=rank,
    )


def _anonymous(
    config: ModelConfig, stages: list[PipelineStage]
) -> tuple[tuple[int, int, bool, bool], ...]:
    """Properties of `stages` that determine their time."""
    return tuple((len(s.layers), s.moe_layers(config), s.is_first, s.is_last) for s in stages)


def _step(
    config: ModelConfig, job: TrainingJob, machine: Machine, stages: list[PipelineStage]
) -> tuple[StepTime, list[Transfer]]:
    """Seconds and transfers of a step on the device that holds `stages`."""
    layout, passes = job.layout, job.micro_batches
    moved = transfers(config, job, machine, stages)
    forward, weights, again = _compute(config, job, machine, stages)
    backward = 2 * forward + again
    compute = forward + backward
    per_pass = [transfer for transfer in moved if not transfer.is_per_step]
    overlaps = layout.pipeline > 1 and layout.schedule in BIDIRECTIONAL
    hides = overlaps and any(t.kind in (DISPATCH, COMBINE) for t in per_pass)
    shown = [0.0, 0.0]
    hidden = 0.0
    for transfer in per_pass:
        seconds = _seconds(transfer, machine) / passes
        if transfer.is_hidden or (overlaps and transfer.kind in (DISPATCH, COMBINE)):
            hidden += seconds
        else:
            shown[0] += seconds * transfer.forward_share
            shown[1] += seconds * (1 - transfer.forward_share)
    slowed = compute / (1 - machine.overlap_share) if hides else compute
    together = max(slowed, hidden) + sum(shown)
    times = StageTimes(
        forward=forward + shown[0],
        backward=backward + shown[1],
        weights=weights,
        overlapped=together,
    )
    sync = sum((_seconds(transfer, machine) for transfer in moved if transfer.is_per_step), 0.0)
    step = StepTime(
        compute=compute * passes,
        traffic=(together - compute) * passes,
        bubble=bubble_seconds(layout, times),
        synchronisation=sync,
        update=_update(config, job, machine, stages),
    )
    return step, moved


def _compute(
    config: ModelConfig, job: TrainingJob, machine: Machine, stages: list[PipelineStage]
) -> tuple[float, float, float]:
    """(forward, weight gradient, recomputation) seconds of a device per micro-batch."""
    forward = weights = again = 0.0
    for stage in stages:
        work = stage_work(config, stage, job.sequence_length)
        kept = {
            layer: sum(all_bytes(config, layer, job, selective=False).values())
            for layer in stage.all_layers(config)
        }
        forward += _product_seconds(job, machine, work) + _pass_seconds(machine, kept.values())
        weights += _product_seconds(
            job, machine, ForwardFlops(products=work.products, plain=work.plain)
        )
        for layer, size in kept.items():
            repeated = recomputed_work(
                config, layer, job.sequence_length, job.activation_checkpointing
            )
            again += _product_seconds(job, machine, repeated)
            if job.activation_checkpointing == "full":
                again += _pass_seconds(machine, [size])
    tokens = job.device_tokens / job.layout.copies
    return forward * tokens, weights * tokens, again * tokens


def _product_seconds(job: TrainingJob, machine: Machine, work: ForwardFlops) -> float:
    plain = machine.flops["fp32" if job.precision == "fp32" else "bf16"]
    products = work.products / machine.flops[job.precision] + work.plain / plain
    return products / machine.product_share + work.scores / (plain * machine.attention_share)


def _pass_seconds(machine: Machine, sizes: Iterable[float]) -> float:
    """Seconds of elementwise kernels, which read and write each saved activation once."""
    return 2 * sum(sizes) / (machine.memory_bandwidth * machine.memory_share)


def _seconds(transfer: Transfer, machine: Machine) -> float:
    """Seconds of a transfer; both links work at the same time."""
    node = transfer.node_bytes / machine.node_bandwidth
    return max(node, transfer.network_bytes / machine.network_bandwidth) / machine.link_share


def _update(
    config: ModelConfig, job: TrainingJob, machine: Machine, stages: list[PipelineStage]
) -> float:
    """Seconds of the optimizer, which reads gradients and reads and writes masters and moments."""
    moved = 0.0
    for part, count in device_parameters(config, stages, job.layout).items():
        own = count / shares(job.layout, part)[1] if job.layout.zero else count
        size = 3 * FP32_BYTES + 2 * moment_bytes(job, part) + cast_bytes(job, part)
        moved += own * size
    return moved / (machine.memory_bandwidth * machine.memory_share)
