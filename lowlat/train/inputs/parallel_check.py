"""Validation of the [parallel] table against the model and the phases of a recipe, before data is
read.
"""

from lowlat.config.model import ModelConfig
from lowlat.train.parallel.mesh import expert_sizes
from lowlat.train.parallel.tensor import check_divisible
from lowlat.train.pipeline.stages import (
    FOLDED,
    Schedule,
    divide,
    needs_embedding,
    planned,
)
from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.recipe.schema import Recipe
from lowlat.utils.errors import UserError


def check_parallel(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError naming the key whose size does not fit."""
    sizes = recipe.parallel
    if sizes.tensor > 1 and recipe.precision == "fp8":
        raise UserError(
            f"{origin}: precision fp8 does not support parallel.tensor {sizes.tensor}; leave it "
            "at 1, or train in bf16"
        )
    if sizes.tensor > 1:
        check_divisible(config, sizes.tensor, origin)
    if sizes.expert > 1:
        experts = 0 if config.moe is None else config.moe.n_routed_experts
        if not experts or experts % sizes.expert:
            raise UserError(
                f"{origin}: parallel.expert {sizes.expert} does not divide n_routed_experts "
                f"{experts}"
            )
        try:
            expert_sizes(sizes, sizes.data * sizes.context)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
    if sizes.pipeline > 1:
        _check_pipeline(config, recipe, origin)
    if sizes.context > 1:
        chunks = 2 * sizes.context
        for phase in recipe.phase:
            if phase.sequence_length % chunks:
                raise UserError(
                    f"{origin}: phase {phase.name}: sequence_length {phase.sequence_length} is not "
                    f"a multiple of {chunks}, twice parallel.context"
                )


def _check_pipeline(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError naming the size that does not fit. PyTorch's schedules have the same rules,
    but raise them only when the first step runs.
    """
    sizes = recipe.parallel
    schedule: Schedule = sizes.pipeline_schedule
    where = f"{origin}: parallel.pipeline {sizes.pipeline}"
    stages = planned(schedule, sizes.pipeline).num_stages
    layers, units = config.num_hidden_layers, len(config.layer_units())
    if stages > units + 1:
        together = "" if units == layers else f", in {units} groups that share a choice of tokens,"
        raise UserError(
            f"{where}: {schedule} makes {stages} stages of num_hidden_layers {layers}{together} "
            "and the head; lower it or choose another pipeline_schedule"
        )
    if sizes.fsdp > 1 and schedule in FOLDED and _is_used_twice(config):
        raise UserError(
            f"{where}: with {schedule} the embedding is in two stages of one process, which fsdp "
            "does not support; use data instead, or another pipeline_schedule"
        )
    parts = sizes.data * sizes.fsdp
    timetable = TrainingSchedule(recipe, ranks=parts)
    counts = {
        (plan.phase.name, plan.rows // (parts * plan.phase.micro_batch_size))
        for plan in map(timetable.at, range(timetable.steps))
    }
    for name, count in sorted(counts):
        check_micro_batches(schedule, sizes.pipeline, count, f"{origin}: phase {name}")


def check_micro_batches(schedule: Schedule, size: int, count: int, where: str) -> None:
    """Raises UserError, starting with `where`, if `schedule` over `size` processes does not support
    `count` micro-batches per process.
    """
    least = {"1f1b": size, "dualpipev": 2 * size}.get(schedule, 1)
    remedy = "change batch_size or micro_batch_size, or choose another pipeline_schedule"
    if count < least:
        raise UserError(
            f"{where}: {count} micro-batches per process, but {schedule} over {size} processes "
            f"needs {least}; {remedy}"
        )
    rounds = max(1, count // size)
    if schedule in ("interleaved", "zb") and count % rounds:
        raise UserError(
            f"{where}: {count} micro-batches per process are not a multiple of the {rounds} rounds "
            f"of {schedule} over {size} processes; {remedy}"
        )


def _is_used_twice(config: ModelConfig) -> bool:
    """Whether first and last stage both use the embedding."""
    last = divide(config, "1f1b", 2, sequence_length=1)[1][0]
    return needs_embedding(config, last)
