"""Run inputs: configs, data, base model and teacher of a training run, opened and checked before
the model is built.

Fingerprints of the inputs are part of every checkpoint, so that a resumed run has the same ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lowlat.config.model import ModelConfig
from lowlat.train.cost.dry_run import require_fit, usable_memory
from lowlat.train.inputs.configs import base_config, check_recipe
from lowlat.train.inputs.grpo_inputs import GRPOInputs, open_grpo_inputs
from lowlat.train.inputs.model_files import (
    has_mtp_copies,
    teacher_config,
    teacher_fingerprint,
    weights_fingerprint,
)
from lowlat.train.inputs.phase_data import (
    PhaseData,
    check_targets,
    check_tokenizers,
    data_notes,
    phase_data,
    phase_dataset,
)
from lowlat.train.policy.prompts import file_fingerprint
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.rewards.reward_file import is_file
from lowlat.utils.progress import Progress


@dataclass(frozen=True, kw_only=True, slots=True)
class RunInputs:
    """All that a run reads and never changes."""

    configs: list[ModelConfig]
    """Model config of each phase."""
    data: list[PhaseData | None]
    """Data of each phase; None for a GRPO phase."""
    grpo: list[GRPOInputs | None]
    """Of each GRPO phase; None for the others."""
    base_model: Path | None
    """Files of recipe.base_model."""
    teacher: Path | None
    """Files of recipe.distillation.teacher."""
    teacher_config: ModelConfig | None
    """Config of the teacher."""
    fingerprints: list[str]
    """Of the data of each phase; with LoRA or a reference also of the base model, which checkpoints
    leave out.
    """
    teacher_fingerprint: str | None
    """Of the teacher."""
    mtp_copies: bool = False
    """Whether exported models have copies of embedding and head in the MTP modules, as base_model
    has. Training shares them.
    """

    @property
    def tokenizer_source(self) -> Path:
        """Folder or .gguf file whose tokenizer and chat template exported models get."""
        return _tokenizer_source(self.base_model, self.data)

    def notes(self, recipe: Recipe) -> Iterator[str]:
        """One line per phase of `recipe` that runs without evaluation or truncates chats."""
        yield from data_notes(recipe, self.data)
        for phase, own in zip(recipe.phase, self.grpo, strict=True):
            if own is not None:
                yield from own.notes(phase.name)

    def close(self) -> None:
        """End the processes of reward functions and tools."""
        for own in self.grpo:
            if own is not None:
                own.close()

    def verify(self, progress: Progress) -> None:
        """Raise UserError unless every file of the datasets matches its checksum."""
        datasets = [data.dataset for data in self.data if data is not None]
        for dataset in {dataset.path: dataset for dataset in datasets}.values():
            dataset.verify(progress)


def open_run_inputs(
    recipe: Recipe, *, base: Path, base_model: Path | None, teacher: Path | None, origin: str
) -> RunInputs:
    """Open and check the inputs of `recipe`.

    base: folder that relative paths of the recipe start from; base_model, teacher: the files that
    the recipe names; origin: the recipe's name in errors. Raises UserError naming phase, key or
    file, and as `require_fit` if the run does not fit in memory.
    """
    configs, data = open_phases(recipe, base_model, base, origin, teacher)
    taught = None if teacher is None else teacher_config(teacher)
    memory = usable_memory(torch.device(recipe.device), recipe.parallel.processes)
    require_fit(configs[0], recipe, memory_bytes=memory, teacher=taught, origin=origin)
    fingerprints = [
        _fingerprint(phase, own, base) for phase, own in zip(recipe.phase, data, strict=True)
    ]
    has_reference = any(phase.grpo is not None and phase.grpo.beta > 0 for phase in recipe.phase)
    if base_model is not None and (recipe.lora is not None or has_reference):
        fingerprints.append(weights_fingerprint(base_model))
    return RunInputs(
        configs=configs,
        data=data,
        grpo=open_grpo_inputs(recipe, base, _tokenizer_source(base_model, data), origin),
        base_model=base_model,
        teacher=teacher,
        teacher_config=taught,
        fingerprints=fingerprints,
        teacher_fingerprint=None if teacher is None else teacher_fingerprint(teacher),
        mtp_copies=base_model is not None and has_mtp_copies(base_model),
    )


def _fingerprint(phase: Phase, data: PhaseData | None, base: Path) -> str:
    """That of the data of `phase`, or of its prompts and reward files."""
    if data is not None:
        return data.dataset.fingerprint
    assert phase.grpo is not None
    files = [name for name in phase.grpo.reward_funcs if is_file(name)]
    if phase.grpo.tool is not None:
        files.append(phase.grpo.tool)
    return " ".join(
        [
            file_fingerprint(base / phase.grpo.prompts, "a JSON Lines file as grpo.prompts"),
            *(file_fingerprint(base / name, "a Python file in grpo") for name in files),
        ]
    )


def _tokenizer_source(base_model: Path | None, data: Sequence[PhaseData | None]) -> Path:
    if base_model is not None:
        return base_model
    return next(own.dataset.path for own in data if own is not None)


def open_phases(
    recipe: Recipe,
    base_model: Path | None,
    base: Path,
    origin: str,
    teacher: Path | None = None,
) -> tuple[list[ModelConfig], list[PhaseData | None]]:
    """Config and data of every phase of `recipe`, checked except for memory.

    Arguments and errors are those of `open_run_inputs`.
    """
    datasets = [phase_dataset(recipe, index, base) for index in range(len(recipe.phase))]
    models = [model for model in (teacher, base_model) if model is not None]
    vocab_size = max((dataset.vocab_size for dataset in datasets if dataset is not None), default=0)
    config = base_config(recipe, base_model, vocab_size, origin)
    configs = check_recipe(config, recipe, origin, teacher)
    check_tokenizers(recipe, datasets, models, origin)
    num_ahead = 1 + config.num_nextn_predict_layers
    data = [
        None if dataset is None else phase_data(recipe, index, dataset, num_ahead)
        for index, dataset in enumerate(datasets)
    ]
    check_targets(recipe, data, origin)
    return configs, data
