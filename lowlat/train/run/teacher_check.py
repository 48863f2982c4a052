"""Whether a model can learn from a teacher as a recipe says.

Owns the refusals, so that a run ends before anything is read.
"""

import hashlib
from pathlib import Path

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.config.model import ModelConfig
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.run.lora_files import start_fingerprint
from lowlat.train.step.trainable import check_divides_batches
from lowlat.utils.errors import UserError


def check_teacher(config: ModelConfig, path: Path, recipe: Recipe, origin: str) -> None:
    """Raises UserError where `recipe` asks of the teacher at `path` what it cannot give a model of
    `config`, naming the key.
    """
    check_divides_batches(recipe, "distillation", origin)
    if recipe.precision == "fp8":
        raise UserError(f"{origin}: distillation trains in bf16 or fp32; set precision = 'bf16'")
    teacher = teacher_config(path)
    if teacher.vocab_size != config.vocab_size:
        raise UserError(
            f"{origin}: distillation.teacher: {path} has a vocabulary of {teacher.vocab_size}, the "
            f"model one of {config.vocab_size}; both must have the same"
        )
    for phase in recipe.phase:
        where = f"{origin}: phase {phase.name}"
        if phase.z_weight:
            raise UserError(f"{where}: z_weight does not go with distillation; leave it out")
        if phase.sequence_length > teacher.max_position_embeddings:
            raise UserError(
                f"{where}: sequence_length {phase.sequence_length} is beyond the teacher's context "
                f"of {teacher.max_position_embeddings}; lower it"
            )
        if phase.match != "logits":
            _check_layers(config, teacher, recipe, phase, where)


def _check_layers(
    config: ModelConfig, teacher: ModelConfig, recipe: Recipe, phase: Phase, where: str
) -> None:
    what = f"{where}: match = '{phase.match}'"
    for field in ("num_hidden_layers", "hidden_size"):
        own, other = getattr(config, field), getattr(teacher, field)
        if own != other:
            raise UserError(
                f"{what} needs layers like the teacher's, but {field} is {own} and the teacher's "
                f"{other}; match 'logits'"
            )
    if recipe.parallel.fsdp > 1:
        raise UserError(
            f"{what} runs layers one by one, which parallel.fsdp does not divide; use parallel.data"
        )


def teacher_config(path: Path) -> ModelConfig:
    """The config of the checkpoint `path`. Raises UserError naming file and field."""
    return read_config(open_checkpoint(path))


def teacher_fingerprint(path: Path) -> str:
    """SHA-256 of what tells the checkpoint `path` from others: its config and samples of its
    weights.
    """
    config = (path / "config.json").read_bytes() if path.is_dir() else b""
    return hashlib.sha256(config + start_fingerprint(path).encode()).hexdigest()
