"""Diagnosis of a step that failed with NaN or infinity: recomputes the step and finds the first
module and gradient that are not finite. Also the file of its batch.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowlat.checkpoint.safetensors.reader import SafetensorsFile
from lowlat.checkpoint.safetensors.writer import file_pieces
from lowlat.data.batch import Batch
from lowlat.train.inputs.configs import phase_configs
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.parallelize import ShardedParameters
from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.run.build import DTYPES, new_model, new_passes, new_teacher
from lowlat.train.run.export import base_model_of, contents, open_save, teacher_of
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.indexers import IndexerLosses
from lowlat.train.step.loss import count_targets
from lowlat.utils.errors import UserError

BATCH_FILES = "failed-step-*.safetensors"
"""Pattern of batch files in a run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedStep:
    """Losses, gradient norm and first non-finite values of a failed step."""

    step: int
    """From 1, as in the run's error."""
    losses: tuple[float, ...]
    """Losses of the main head and of each MTP module, nats per token; empty in phases that match
    layers or attention.
    """
    matched: float | None
    """With a teacher, the mean divergence from it or the error of the matched layers."""
    sequence_loss: float
    """Sequence-wise balance loss, alpha included."""
    grad_norm: float
    """Global norm before clipping."""
    activation: str | None
    """Name of the first module whose output is not finite; modules of the teacher start with
    `teacher.`.
    """
    gradient: str | None
    """Name of the parameter closest to the loss whose gradient is not finite."""


def diagnose_failed_step(run: Path) -> FailedStep:
    """Recompute the last failed step of the run folder `run` in this process.

    Raises UserError if no step failed, or if the checkpoint before it, its base model or its
    teacher is missing or has changed.
    """
    path = max(run.glob(BATCH_FILES), default=None)
    if path is None:
        raise UserError(f"{run}: has no failed step; name a run that ended with one")
    batch, step = read_batch(path), step_of(path)
    save = open_save(run, step)
    config, recipe, weights = contents(save)
    ranks = recipe.parallel.data * recipe.parallel.fsdp
    plan = TrainingSchedule(recipe, ranks=ranks).at(step)
    # The checkpoint may be from the phase before.
    own = recipe.model_copy(update={"phase": [plan.phase]})
    (config,) = phase_configs(config, own, str(save.folder))
    base_model = None if recipe.lora is None else base_model_of(save)
    model = new_model(config, recipe, base_model, weights, plan.phase)
    teacher = None if recipe.distillation is None else new_teacher(teacher_of(save), recipe)
    passes, sharded = new_passes(
        model,
        ProcessMesh(),
        device=recipe.device,
        dtype=DTYPES[recipe.precision],
        sequence_length=plan.phase.sequence_length,
        teacher=teacher,
    )
    balancer = LoadBalancer(model, sequence_weight=recipe.balance.sequence_weight)
    num_ahead = 1 + config.num_nextn_predict_layers
    targets = count_targets(batch, num_ahead)
    length = batch.sequence_length(num_ahead)
    watched = {"": model} if teacher is None else {"": model, "teacher.": teacher.model}
    coeff = plan.phase.dsa_indexer_loss_coeff
    with (
        _first_not_finite(watched) as found,
        balancer.observe(sequence_length=length, num_sequences=batch.rows),
        IndexerLosses(model).observe(queries=batch.rows * length, coeff=coeff),
    ):
        sums = passes.backward(batch.to(recipe.device), plan, targets).tolist()
    sharded.reduce_gradients()
    with_gradients = [param.name for param in sharded.parameters if param.local.grad is not None]
    losses = tuple(total / max(1, count) for total, count in zip(sums, targets, strict=False))
    return FailedStep(
        step=step + 1,
        losses=losses if plan.phase.trains_heads else (),
        matched=None if teacher is None else sums[num_ahead + 1] / max(1, targets[0]),
        sequence_loss=balancer.sequence_loss,
        grad_norm=sharded.gradient_norm(with_gradients).item() if with_gradients else math.nan,
        activation=next(iter(found), None),
        gradient=_nearest_gradient(sharded),
    )


@contextmanager
def _first_not_finite(models: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Collects the name of the first module whose output is not finite, with the prefix of its
    model in `models`.
    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not found and not all(tensor.isfinite().all() for tensor in _tensors(output)):
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(watch(prefix + name))
        for prefix, model in models.items()
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """Floating-point tensors in the output of a module."""
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _nearest_gradient(sharded: ShardedParameters) -> str | None:
    """The last parameter in the model's order whose gradient is not finite: the backward pass
    reached it first.
    """
    for param in reversed(sharded.parameters):
        gradient = param.local.grad
        if gradient is not None and not torch.isfinite(gradient).all():
            return param.name
    return None


def batch_file(folder: Path, step: int) -> Path:
    """Path of the batch of `step` (from 0) in a run folder."""
    return folder / f"failed-step-{step + 1:08}.safetensors"


def step_of(path: Path) -> int:
    """The step (from 0) in the name of a batch file."""
    return int(path.stem.rpartition("-")[2]) - 1


def keep_batch(path: Path, step: int, batch: Batch) -> str:
    """Write `batch` of `step` (from 0) to `path`, replacing an existing file.

    Returns the path, or the reason why writing failed, as a phrase for the error of the step: a
    write error must not hide the step's error.
    """
    metadata = {"documents": json.dumps(batch.documents), "step": str(step)}
    tensors = [("tokens", batch.tokens), ("loss_mask", batch.loss_mask)]
    partial = path.with_suffix(".partial")
    try:
        with partial.open("wb") as file:
            file.writelines(file_pieces(tensors, metadata))
        partial.rename(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        return f"not saved ({error})"
    return f"in {path}"


def read_batch(path: Path) -> Batch:
    """Read a file of `keep_batch`. Raises UserError."""
    try:
        file = SafetensorsFile(path)
        tokens, loss_mask = file.read("tokens"), file.read("loss_mask")
        documents = json.loads(file.metadata["documents"])
    except (UserError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: is not the batch file of a failed step ({error})") from error
    rows = None if documents is None else tuple(tuple(row) for row in documents)
    return Batch(tokens=tokens, loss_mask=loss_mask.to(torch.bool), documents=rows)
