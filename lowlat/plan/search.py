"""Search for the fastest parallel layout on a cluster, and the effect of single changes."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lowlat.config.model import ModelConfig
from lowlat.plan.estimate import Estimate, divided, estimate, timed
from lowlat.plan.job import (
    ActivationCheckpointing,
    ParallelLayout,
    Schedule,
    TrainingJob,
    ZeroStage,
    check,
)
from lowlat.plan.machine import Machine
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved", "zb1p", "dualpipe", "dualpipev")
CHECKPOINTING_MODES: tuple[ActivationCheckpointing, ...] = ("none", "selective", "full")
ZERO_STAGES: tuple[ZeroStage, ...] = (1, 2, 3)
MOST_TENSOR = 8
MOST_STAGES = 64
NO_DIVISION, NO_MEMORY = "not divisible", "do not fit in memory"
"""Reasons why layouts fail."""
TIE = 0.01
"""Layouts whose times differ by less than this share are ranked by network traffic."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    ranked: list[Estimate]
    """Layouts that fit, best first, each with its fastest ZeRO stage and activation
    checkpointing."""
    tried: int
    """Number of layouts tried."""
    failed: Counter[str]
    """Number of failed layouts by reason."""


def search(
    config: ModelConfig,
    job: TrainingJob,
    machine: Machine,
    layouts: Sequence[ParallelLayout],
    progress: Progress | None = None,
) -> SearchResult:
    """Rank `layouts` for `job`, each with its fastest ZeRO stage and activation checkpointing.

    Raises UserError if none divides the model or none fits in memory.
    """
    ranked: list[Estimate] = []
    failed: Counter[str] = Counter()
    progress = progress or SilentProgress()
    with progress.task("layouts", total=len(layouts)) as task:
        for layout in layouts:
            best = _best(config, replace(job, layout=layout), machine, failed)
            ranked += [] if best is None else [best]
            task.advance(1)
    if not ranked and not failed[NO_MEMORY]:
        devices = layouts[0].devices
        near = _nearest(config, job, machine, devices)
        raise UserError(
            f"{devices} devices do not divide {job.batch_size} rows per step and the model's heads "
            f"and experts; give {near} instead"
        )
    if not ranked:
        raise UserError(
            f"no layout of this model fits devices of {machine.memory_bytes / 2**30:.0f} GB; give "
            "more of them, or more memory"
        )
    ranked.sort(key=lambda found: found.time.total)
    return SearchResult(ranked=_break_ties(ranked), tried=len(layouts), failed=failed)


def all_layouts(config: ModelConfig, devices: int, machine: Machine) -> list[ParallelLayout]:
    """Every layout of `config` over `devices` devices with powers of two."""
    experts = 1 if config.moe is None else config.moe.n_routed_experts
    return [
        ParallelLayout(
            fsdp=devices // (pipeline * tensor),
            tensor=tensor,
            expert=expert,
            pipeline=pipeline,
            schedule=schedule,
        )
        for pipeline in _powers(min(MOST_STAGES, config.num_hidden_layers, devices))
        for tensor in _powers(min(MOST_TENSOR, machine.devices_per_node, devices // pipeline))
        if devices % (pipeline * tensor) == 0
        for expert in _powers(min(experts, devices // (pipeline * tensor)))
        for schedule in (SCHEDULES if pipeline > 1 else SCHEDULES[:1])
    ]


def _nearest(config: ModelConfig, job: TrainingJob, machine: Machine, devices: int) -> int:
    """The number of devices closest to `devices` for which a layout exists; at least one."""
    for distance in range(1, devices):
        for number in (devices - distance, devices + distance):
            if any(
                _is_possible(config, replace(job, layout=layout))
                for layout in all_layouts(config, number, machine)
            ):
                return number
    return 1


def _is_possible(config: ModelConfig, job: TrainingJob) -> bool:
    try:
        check(config, job)
    except UserError:
        return False
    return True


def _powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length())]


def _best(
    config: ModelConfig, job: TrainingJob, machine: Machine, failed: Counter[str]
) -> Estimate | None:
    """The fastest ZeRO stage and activation checkpointing of a layout; None if none fits."""
    if not _is_possible(config, job):
        failed[NO_DIVISION] += 1
        return None
    found = []
    # Later entries need less memory and more time.
    for mode in CHECKPOINTING_MODES:
        for zero in ZERO_STAGES:
            tried = replace(
                job, activation_checkpointing=mode, layout=replace(job.layout, zero=zero)
            )
            devices, memory = divided(config, tried, machine)
            if memory.total <= machine.usable_bytes:
                found.append(timed(config, tried, machine, devices, memory))
                break
    if not found:
        failed[NO_MEMORY] += 1
        return None
    return min(found, key=lambda each: each.time.total)


def _break_ties(ranked: list[Estimate]) -> list[Estimate]:
    """Sort groups of layouts whose times differ by less than TIE by network traffic."""
    result: list[Estimate] = []
    while ranked:
        limit = ranked[0].time.total * (1 + TIE)
        group = [found for found in ranked if found.time.total <= limit]
        result += sorted(group, key=lambda found: found.network_bytes)
        ranked = ranked[len(group) :]
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """A layout that differs in one setting."""

    change: str
    """The setting."""
    found: Estimate | None
    """None if the layout is impossible."""
    why: str
    """Main reason why it is better, worse or impossible."""


def neighbours(config: ModelConfig, base: Estimate) -> list[Neighbour]:
    """Layouts that differ from `base` in one setting, with their cost."""
    return [_neighbour(config, base, change, job) for change, job in _changes(base.job)]


def _changes(job: TrainingJob) -> Iterator[tuple[str, TrainingJob]]:
    layout = job.layout
    for schedule in SCHEDULES if layout.pipeline > 1 else ():
        yield schedule, replace(job, layout=replace(layout, schedule=schedule))
    sizes = (
        ("pipeline", layout.pipeline, 1),
        ("expert", layout.expert, 0),
        ("tensor", layout.tensor, 1),
    )
    for name, size, takes_replicas in sizes:
        for factor in (0.5, 2):
            changed = int(size * factor)
            fsdp = layout.fsdp / factor if takes_replicas else layout.fsdp
            if changed >= 1 and fsdp >= 1 and fsdp == int(fsdp):
                sized = replace(layout, **{name: changed}, fsdp=int(fsdp))
                yield f"{name} {changed}", replace(job, layout=sized)
    for zero in (0, *ZERO_STAGES) if layout.fsdp > 1 else ():
        yield f"ZeRO-{zero}", replace(job, layout=replace(layout, zero=zero))
    for mode in CHECKPOINTING_MODES:
        yield f"activation checkpointing {mode}", replace(job, activation_checkpointing=mode)
    for precision in ("bf16", "fp8"):
        yield precision, replace(job, precision=precision)


def _neighbour(config: ModelConfig, base: Estimate, change: str, job: TrainingJob) -> Neighbour:
    if job == base.job:
        return Neighbour(change=change, found=base, why="this layout")
    try:
        found = estimate(config, job, base.machine)
    except UserError as error:
        return Neighbour(change=change, found=None, why=str(error))
    return Neighbour(change=change, found=found, why=_verdict(base, found))


def _verdict(base: Estimate, found: Estimate) -> str:
    if not found.fits:
        missing = found.memory.total - found.machine.usable_bytes
        return f"does not fit: {missing / 1e9:.1f} GB more, mostly {found.memory.largest}"
    parts = ("compute", "traffic", "bubble", "synchronisation")
    changes = {part: getattr(found.time, part) - getattr(base.time, part) for part in parts}
    total = found.time.total - base.time.total
    if abs(total) < TIE * base.time.total:
        more = (found.network_bytes - base.network_bytes) / 1e9
        return f"as fast; {more:+.0f} GB over the network"
    main = max(changes, key=lambda part: changes[part] * (1 if total > 0 else -1))
    return f"{total / base.time.total:+.0%}, mostly {main} ({changes[main]:+.1f} s)"
