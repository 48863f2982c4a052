"""Complete state of a training run, as named tensors and JSON metadata, and validation on resume.

The state is the weights with routing biases, the optimizer state, the random state, the position
in the data, and the recipe. Tensors are full, not sharded, so a run resumes with another parallel
layout (resharding, as torch.distributed.checkpoint does).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig
from lowlat.train.inputs.run_inputs import RunInputs
from lowlat.train.parallel.parallelize import ShardedParameters
from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.train.step.lora import is_lora_parameter
from lowlat.train.step.optim import Optimizer
from lowlat.utils.errors import UserError

MODEL, OPTIMIZER, RANDOM, ROLLOUTS = "model.", "optimizer.", "random.torch", "rollouts."
FREE_KEYS = (
    "name",
    "checkpoints",
    "log",
    "evaluation",
    "parallel",
    "device",
    "activation_checkpointing",
)
"""Recipe keys that a resumed run may change, because they do not affect the results."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Progress of a run."""

    step: int
    """Completed optimizer steps."""
    seconds: float
    """Training time so far, summed over all resumptions."""


def state_tensors(sharded: ShardedParameters, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Full tensors of the state by name, one at a time, so that no process needs memory for all.

    On a single process they are views. With LoRA the state excludes the frozen weights. Collective.
    """
    updates_only = any(is_lora_parameter(param.name) for param in sharded.parameters)
    for name, tensor in sharded.full_parameters():
        if is_lora_parameter(name) or not updates_only:
            yield MODEL + name, tensor
    for name, tensor in optimizer.tensors():
        yield OPTIMIZER + name, tensor
    yield RANDOM, torch.get_rng_state()


def snapshot(
    sharded: ShardedParameters,
    optimizer: Optimizer,
    *,
    rollouts: Iterable[tuple[str, Tensor]] = (),
    keep: bool = True,
) -> list[tuple[str, Tensor]]:
    """Copy of `state_tensors` and of the state `rollouts` of a GRPO phase in CPU memory.
    Collective: with `keep` false, this process takes part but stores nothing.
    """
    own = ((ROLLOUTS + name, tensor) for name, tensor in rollouts)
    return [
        (name, tensor.detach().to("cpu", copy=True))
        for name, tensor in chain(state_tensors(sharded, optimizer), own)
        if keep
    ]


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Tensors whose names start with `prefix`, with the prefix removed."""
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def facts(
    recipe: Recipe,
    config: ModelConfig,
    position: Position,
    inputs: RunInputs,
    schedule: TrainingSchedule,
) -> dict[str, Any]:
    """JSON metadata of the state. Numbers of sequences and tokens follow from step and recipe and
    are recorded for information.
    """
    done = position.step >= schedule.steps
    plan = schedule.at(min(position.step, schedule.steps - 1))
    return {
        "step": position.step,
        "seconds": position.seconds,
        "phase": plan.phase_index,
        "rows_of_data": plan.first_row + (plan.rows if done else 0),
        "tokens": schedule.tokens_before(position.step),
        "data": inputs.fingerprints,
        "config": config_to_hf(config),
        "recipe": recipe.model_dump(mode="json"),
        "base_model": _absolute(inputs.base_model),
        "mtp_copies": inputs.mtp_copies,
        "teacher": inputs.teacher_fingerprint,
        "teacher_files": _absolute(inputs.teacher),
        "torch": torch.__version__,
    }


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def check_resumable(
    saved: Mapping[str, Any],
    recipe: Recipe,
    inputs: RunInputs,
    schedule: TrainingSchedule,
    folder: str,
) -> Position:
    """Position at which a run resumes. Raises UserError naming the differences if recipe, data or
    teacher differ from those of the checkpoint.
    """
    # Recipe keys newer than the checkpoint have their defaults.
    before = parse_recipe(dict(saved["recipe"]), origin=folder).model_dump(mode="json")
    differences = list(_differences(before, recipe.model_dump(mode="json")))
    differences = [text for key, text in differences if key.split(".")[0] not in FREE_KEYS]
    phases = len(recipe.phase)
    if saved["data"][:phases] != inputs.fingerprints[:phases]:
        differences.append("its data, prompts or reward files have changed")
    if saved["data"][phases:] != inputs.fingerprints[phases:]:
        differences.append("base_model has other weights")
    if saved.get("teacher") != inputs.teacher_fingerprint:
        differences.append("distillation.teacher is another model")
    if differences:
        raise UserError(
            f"{folder}: was trained with another recipe: {'; '.join(differences[:5])}; "
            "restore it, or choose another --out for the changed one"
        )
    step = int(saved["step"])
    if saved["tokens"] != schedule.tokens_before(step):
        raise UserError(
            f"{folder}: trained on {saved['tokens']:,} tokens in {step} steps, but batches rounded "
            f"for this [parallel] have {schedule.tokens_before(step):,}; choose sizes whose "
            "data x fsdp x micro_batch_size divides batch_size"
        )
    return Position(step=step, seconds=float(saved["seconds"]))


def check_config(
    saved: Mapping[str, Any],
    configs: Sequence[ModelConfig],
    schedule: TrainingSchedule,
    folder: str,
) -> None:
    """Raises UserError naming the differences if the checkpoint's model config is not that of its
    phase, for example because the base model has changed.
    """
    done = max(0, int(saved["step"]) - 1)
    present = config_to_hf(configs[schedule.at(done).phase_index])
    # Config keys newer than the checkpoint have their defaults.
    before = config_to_hf(config_from_hf(dict(saved["config"]), source=folder))
    changes = [text for _, text in _differences(before, present)]
    if changes:
        raise UserError(
            f"{folder}: was trained with another model config: {'; '.join(changes[:5])}; restore "
            "the config.json of base_model, or choose another --out for the changed one"
        )


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            below = f"{path}.{key}" if path else key
            yield from _differences(old.get(key), new.get(key), below)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (left, right) in enumerate(zip(old, new, strict=True)):
            yield from _differences(left, right, f"{path}.{index}")
    elif old != new:
        yield path, f"{path} was {old!r} and is {new!r}"
