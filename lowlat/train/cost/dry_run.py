"""Dry run of a recipe: parameters, FLOPs, memory and time on this machine, and the out-of-memory
check before a run starts.
"""

import os
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.plan.flops import TokenFlops, token_flops
from lowlat.plan.job import ParallelLayout, Schedule, TrainingJob, ZeroStage
from lowlat.plan.memory import (
    ACTIVATIONS,
    OPTIMIZER,
    WEIGHTS,
    WORKING,
    MemoryEstimate,
    device_memory,
)
from lowlat.plan.stages import cut, held
from lowlat.train.cost.frozen_weights import (
    UPDATES,
    gradient_bytes,
    learning_memory,
    training_flops,
    update_bytes,
)
from lowlat.train.cost.rollout_memory import ROLLOUT_CACHE, rollout_memory
from lowlat.train.recipe.schedule import TrainingSchedule, most_rows
from lowlat.train.recipe.schema import ParallelConfig, Phase, Recipe
from lowlat.utils.errors import UserError
from lowlat.utils.memory import memory_limit

REACHED = (0.1, 0.5)
"""MFU range to expect: of small models, of large ones."""
PROGRAM_BYTES = 400 * 2**20
"""Memory of the program and its libraries."""
CHECKPOINT_COPY, PHASES = "checkpoint copy", "change of phase"
"""Memory parts of a run beyond a step: copies of the state."""
BATCH = "batch"
TOKEN_BYTES = 9
"""Bytes per token of a batch: int64 id and loss mask."""
KEPT_BY_PHASES = (WEIGHTS, OPTIMIZER, "teacher")
"""Memory parts that stay allocated during a change of phase."""
ALLOCATOR = 1.08
"""Allocated over requested memory, as measured (docs/planning.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DryRun:
    """Cost of a recipe, estimated before the first step."""

    parameters: int
    """Number of parameters, MTP modules included."""
    active: int
    """Active parameters per token of the main model."""
    processes: int
    """Number of processes."""
    steps: int
    """Optimizer steps of all phases."""
    tokens: int
    """Input tokens of all phases."""
    flops: list[TokenFlops]
    """FLOPs per token of each phase."""
    trained_flops: list[float]
    """FLOPs per token of each phase, without gradients of frozen weights, with the teacher and the
    sampling of GRPO.
    """
    memory: MemoryEstimate
    """Memory of a process in the largest phase, without program and libraries."""
    memory_bytes: int
    """Memory available to a process."""
    total_flops: float
    """FLOPs of the whole training, without recomputation."""
    rate: float
    """Measured FLOP/s of matrix products in one process."""

    @property
    def seconds(self) -> tuple[float, float]:
        """Least and most expected time, at the higher and lower share of REACHED."""
        whole = self.total_flops / (self.rate * self.processes)
        return whole / REACHED[1], whole / REACHED[0]


def dry_run(
    config: ModelConfig,
    recipe: Recipe,
    *,
    rate: float,
    memory_bytes: int,
    teacher: ModelConfig | None = None,
) -> DryRun:
    """The cost of `recipe` for `config`.

    rate: FLOP/s of matrix products in the recipe's precision (`plan.rate.measure_gemm_rate`);
    memory_bytes: memory available to a process; teacher: config of the teacher. The parallel layout
    must be valid (`inputs.parallel_check`).
    """
    jobs = [job_of(recipe, phase) for phase in recipe.phase]
    schedule = TrainingSchedule(recipe, ranks=recipe.parallel.data * recipe.parallel.fsdp)
    flops = [token_flops(config, job.sequence_length, job.activation_checkpointing) for job in jobs]
    bounds = [0]
    for phase in recipe.phase:
        bounds.append(bounds[-1] + phase.steps)
    tokens = [schedule.tokens_before(step) for step in bounds]
    count = count_parameters(config)
    trained = [training_flops(config, recipe, phase, teacher) for phase in recipe.phase]
    memories = [_memory(config, recipe, phase, teacher) for phase in recipe.phase]
    return DryRun(
        parameters=count.total + count.mtp + (count.mtp_copies if config.mtp_copies else 0),
        active=count.active,
        processes=recipe.parallel.processes,
        steps=schedule.steps,
        tokens=schedule.tokens,
        flops=flops,
        trained_flops=trained,
        memory=max(memories, key=lambda memory: memory.total),
        memory_bytes=memory_bytes,
        total_flops=sum(
            each * (after - before)
            for each, (before, after) in zip(trained, pairwise(tokens), strict=True)
        ),
        rate=rate,
    )


def require_fit(
    config: ModelConfig,
    recipe: Recipe,
    *,
    memory_bytes: int,
    teacher: ModelConfig | None = None,
    origin: str = "recipe",
) -> MemoryEstimate:
    """Memory of a process in the largest phase. Raises UserError naming the largest part and a
    remedy if it exceeds `memory_bytes`. origin: the recipe's name in errors.
    """
    phase, memory = most_memory(config, recipe, teacher)
    if needed_bytes(memory) <= memory_bytes:
        return memory
    raise UserError(
        f"{origin}: phase '{phase.name}' needs about {gigabytes(needed_bytes(memory))} of memory "
        f"per process and {gigabytes(memory_bytes)} are available; the largest part is "
        f"{gigabytes(memory.parts[memory.largest])} of {memory.largest}: "
        f"{_remedy(recipe, phase, memory)}"
    )


def most_memory(
    config: ModelConfig, recipe: Recipe, teacher: ModelConfig | None
) -> tuple[Phase, MemoryEstimate]:
    """The phase with the largest memory, and its memory per process."""
    found = ((p, _memory(config, recipe, p, teacher)) for p in recipe.phase)
    return max(found, key=lambda each: each[1].total)


def job_of(recipe: Recipe, phase: Phase) -> TrainingJob:
    """`phase` of `recipe` as a TrainingJob with the smallest batch: one micro-batch per process, or
    the minimum of the pipeline.
    """
    layout = layout_of(recipe.parallel)
    rows = phase.micro_batch_size * layout.data * layout.fsdp
    return TrainingJob(
        sequence_length=phase.sequence_length,
        batch_size=rows * (2 * layout.pipeline if layout.pipeline > 1 else 1),
        micro_batch_size=phase.micro_batch_size,
        precision=recipe.precision,
        optimizer=recipe.optimizer.name,
        activation_checkpointing=recipe.activation_checkpointing,
        layout=layout,
    )


def largest_job(recipe: Recipe) -> TrainingJob:
    """The phase of `recipe` with the most tokens per step, at its largest batch."""
    unit = recipe.parallel.data * recipe.parallel.fsdp
    jobs = []
    for phase in recipe.phase:
        each = phase.micro_batch_size * unit
        jobs.append(replace(job_of(recipe, phase), batch_size=most_rows(phase, each)))
    return max(jobs, key=lambda job: job.tokens)


def usable_memory(device: torch.device, processes: int) -> int:
    """Memory available to each of `processes` processes: that of the GPU, or a share of this
    machine's.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return memory_limit() // on_this_machine(processes)


def on_this_machine(processes: int) -> int:
    """Number of processes that share this machine's memory: LOCAL_WORLD_SIZE, else `processes`."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", processes))


def layout_of(parallel: ParallelConfig) -> ParallelLayout:
    """The layout of a recipe. FSDP2 gathers weights layer by layer (ZeRO-3); in a pipeline they
    stay gathered from the first to the last micro-batch (ZeRO-2).
    """
    schedules: dict[str, Schedule] = {"zb": "zb1p", "zbv": "dualpipev"}
    zero: ZeroStage = 0 if parallel.fsdp == 1 else 3 if parallel.pipeline == 1 else 2
    name = parallel.pipeline_schedule
    return ParallelLayout(
        data=parallel.data,
        fsdp=parallel.fsdp,
        zero=zero,
        tensor=parallel.tensor,
        divides_tables=False,
        context=parallel.context,
        expert=parallel.expert,
        pipeline=parallel.pipeline,
        schedule=schedules[name] if name in schedules else name,  # pyright: ignore[reportArgumentType]
    )


def needed_bytes(memory: MemoryEstimate) -> float:
    """Memory of a process with allocator overhead, program and libraries."""
    return memory.total * ALLOCATOR + PROGRAM_BYTES


def _memory(
    config: ModelConfig, recipe: Recipe, phase: Phase, teacher: ModelConfig | None
) -> MemoryEstimate:
    job = job_of(recipe, phase)
    memory = _step_memory(config, recipe, job, teacher)
    if phase.grpo is not None:
        memory = rollout_memory(memory, config, recipe, phase, job)
    if recipe.device == "cpu":  # with a GPU, copies of the state are in host memory
        memory = _with_copies(memory, recipe, _state_bytes(config, recipe, job))
    return replace(memory, parts=memory.parts | {BATCH: _batch_bytes(config, recipe, phase)})


def _step_memory(
    config: ModelConfig, recipe: Recipe, job: TrainingJob, teacher: ModelConfig | None
) -> MemoryEstimate:
    costs = (1.0,) * (config.num_hidden_layers + 1)
    memory = device_memory(config, job, held(cut(config, job.layout, costs), job.layout))
    return learning_memory(memory, config, recipe, job, teacher)


def _batch_bytes(config: ModelConfig, recipe: Recipe, phase: Phase) -> float:
    """A process's rows of the largest global batch, which is built before it is used."""
    ranks = recipe.parallel.data * recipe.parallel.fsdp
    rows = most_rows(phase, phase.micro_batch_size * ranks) // ranks
    return float(TOKEN_BYTES) * rows * (phase.sequence_length + 1 + config.num_nextn_predict_layers)


def _state_bytes(config: ModelConfig, recipe: Recipe, job: TrainingJob) -> float:
    """Bytes of the state in a checkpoint; with LoRA, the updates only."""
    if recipe.lora is not None:
        return update_bytes(config, recipe.lora, job) - gradient_bytes(config, recipe.lora)
    undivided = replace(job, layout=layout_of(ParallelConfig()), batch_size=job.micro_batch_size)
    parts = _step_memory(config, recipe, undivided, None).parts
    return parts[WEIGHTS] + parts[OPTIMIZER]


def _with_copies(memory: MemoryEstimate, recipe: Recipe, state: float) -> MemoryEstimate:
    """`memory` plus copies of the state.

    A checkpoint copy is in one process per machine. A change of phase holds the full state in every
    process for a moment, beyond what a step frees (a single process moves its state).
    """
    parallel = recipe.parallel
    parts = memory.parts | {CHECKPOINT_COPY: state / on_this_machine(parallel.processes)}
    if len(recipe.phase) > 1 and parallel.processes > 1:
        free = sum(size for part, size in memory.parts.items() if part not in KEPT_BY_PHASES)
        parts[PHASES] = max(0.0, state - free)
    return replace(memory, parts=parts)


def _remedy(recipe: Recipe, phase: Phase, memory: MemoryEstimate) -> str:
    if memory.largest in (ACTIVATIONS, WORKING):
        if phase.micro_batch_size > 1:
            return f"lower micro_batch_size ({phase.micro_batch_size})"
        if recipe.activation_checkpointing == "none" and phase.grpo is None:
            return "set activation_checkpointing = 'full'"
        context = "" if phase.grpo is not None else " or raise parallel.context"
        return f"lower sequence_length ({phase.sequence_length}){context}"
    if memory.largest == ROLLOUT_CACHE:
        return "lower grpo.max_completion_length or sequence_length"
    if memory.largest == BATCH:
        return "lower batch_size, or raise parallel.data"
    if recipe.lora is not None and memory.largest in (UPDATES, CHECKPOINT_COPY):
        return f"lower lora.rank ({recipe.lora.rank}) or name fewer lora.target_modules"
    if memory.largest == CHECKPOINT_COPY:
        muon = " or optimizer.name = 'muon'" if recipe.optimizer.name == "adamw" else ""
        return f"use a smaller model{muon}; checkpoints are written from a copy"
    if memory.largest == OPTIMIZER and recipe.optimizer.name == "adamw":
        return "use a smaller model, optimizer.name = 'muon', or raise parallel.fsdp"
    return "use a smaller model, or raise parallel.fsdp, parallel.expert or parallel.pipeline"


def gigabytes(size: int | float) -> str:
    """`size` bytes as text, in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
