"""What a run rests on: data and configs, the checkpoint it starts from, the teacher; checked before
anything is built, and known again when the run goes on.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from lowlat.config.model import ModelConfig
from lowlat.train.recipe.schema import Recipe
from lowlat.train.run.dry_run import require_fit, usable_memory
from lowlat.train.run.inputs import Inputs, open_inputs
from lowlat.train.run.lora_files import weights_fingerprint
from lowlat.train.step.teacher import teacher_config, teacher_fingerprint
from lowlat.utils.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Basis:
    """All that a run reads and never changes."""

    inputs: Inputs
    base_model: Path | None
    """The files behind recipe.base_model."""
    teacher: Path | None
    """The files behind recipe.distillation."""
    teacher_config: ModelConfig | None
    """Of what is learned from."""
    fingerprints: list[str]
    """Of the data of every phase, and of a base_model that saves hold only updates of."""
    taught_by: str | None
    """Fingerprint of the teacher."""

    @property
    def text(self) -> Path:
        """The folder with the tokenizer of the models that the run exports."""
        return self.inputs.data[0].folder.path if self.base_model is None else self.base_model

    def verify(self, progress: Progress) -> None:
        """Raise UserError unless every byte of the data is what was written."""
        for folder in {data.folder.path: data.folder for data in self.inputs.data}.values():
            folder.verify(progress)


def open_basis(
    recipe: Recipe, *, base: Path, base_model: Path | None, teacher: Path | None, origin: str
) -> Basis:
    """Open what `recipe` names. base: where its relative paths begin; origin: its name in errors.

    Raises UserError as `open_inputs`, and where the training cannot fit the memory.
    """
    inputs = open_inputs(recipe, base_model, base, origin, teacher)
    taught = None if teacher is None else teacher_config(teacher)
    memory = usable_memory(torch.device(recipe.device), recipe.parallel.processes)
    require_fit(inputs.configs[0], recipe, memory_bytes=memory, teacher=taught, origin=origin)
    fingerprints = [data.folder.fingerprint for data in inputs.data]
    if recipe.lora is not None and base_model is not None:
        fingerprints.append(weights_fingerprint(base_model))
    return Basis(
        inputs=inputs,
        base_model=base_model,
        teacher=teacher,
        teacher_config=taught,
        fingerprints=fingerprints,
        taught_by=None if teacher is None else teacher_fingerprint(teacher),
    )
