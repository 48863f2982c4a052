"""Model config of each phase of a recipe, and validation of the recipe against the model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import resolve_mtp_modules
from lowlat.config.attention import distinct
from lowlat.config.hf.families import LOWLAT
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.rope import rope_from_hf
from lowlat.config.model import MLAConfig, ModelConfig, RopeConfig, TPAConfig
from lowlat.data.dataset import TokenizedDataset
from lowlat.train.inputs.model_files import teacher_config
from lowlat.train.inputs.parallel_check import check_parallel
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.step.lora import check_lora
from lowlat.train.step.trainable import check_divides_batches, check_stages, check_trainable
from lowlat.utils.errors import UserError
from lowlat.utils.json_fields import JsonFields

NULLABLE = ("q_lora_rank", "sliding_window")
"""Fields of config.json that are null if missing from [model], since TOML has no null."""


def recipe_config(recipe: Recipe, path: Path, base_model: Path | None) -> ModelConfig:
    """Model config of the recipe at `path`; vocab_size defaults to that of the data.

    base_model: files of recipe.base_model. Raises UserError.
    """
    vocab_size = (recipe.model or {}).get("vocab_size")
    if not isinstance(vocab_size, int):
        vocab_size = 0
        if recipe.data is not None:
            vocab_size = TokenizedDataset.open(path.parent / recipe.data.folder).vocab_size
    return base_config(recipe, base_model, vocab_size, str(path))


def base_config(
    recipe: Recipe, base_model: Path | None, vocab_size: int, origin: str
) -> ModelConfig:
    """Model config before the changes of phases. Raises UserError naming the field."""
    if base_model is not None:
        source = open_checkpoint(base_model)
        config = resolve_mtp_modules(read_config(source), source)
        # training shares embedding and head (`train.run.build.load_base_model`)
        config = replace(config, quantization=None, packing=None, mtp_copies=False)
    else:
        absent = dict.fromkeys(NULLABLE) if (recipe.model or {}).get("model_type") != LOWLAT else {}
        raw = {"vocab_size": vocab_size, **absent, **(recipe.model or {})}
        config = config_from_hf(raw, source=f"{origin}: [model]")
        if config.quantization is not None or config.packing is not None:
            raise UserError(
                f"{origin}: [model]: quantization_config describes stored checkpoints; leave it "
                "out (precision = 'fp8' trains in FP8, train export --dtype fp8 stores it)"
            )
    if config.vocab_size < vocab_size:
        raise UserError(
            f"{origin}: the data has {vocab_size} token ids, but the model's vocab_size is "
            f"{config.vocab_size}; leave vocab_size out or tokenize with the model's tokenizer"
        )
    return config


def phase_configs(config: ModelConfig, recipe: Recipe, origin: str) -> list[ModelConfig]:
    """Model config of each phase; changes of RoPE scaling and context apply to later phases too.

    Raises UserError naming phase and key.
    """
    configs = []
    for phase in recipe.phase:
        config = _phase_config(config, phase, origin)
        configs.append(config)
    return configs


def _phase_config(config: ModelConfig, phase: Phase, origin: str) -> ModelConfig:
    longest = phase.max_position_embeddings or config.max_position_embeddings
    if phase.sequence_length > longest:
        raise UserError(
            f"{origin}: phase {phase.name}: sequence_length {phase.sequence_length} exceeds "
            f"max_position_embeddings {longest}; raise max_position_embeddings"
        )
    rope = (
        config.rope if phase.rope_scaling is None else _changed_rope(config, phase, longest, origin)
    )
    return replace(config, rope=rope, max_position_embeddings=longest)


def _changed_rope(config: ModelConfig, phase: Phase, longest: int, origin: str) -> RopeConfig:
    """RoPE config with the rope_scaling of `phase`.

    Defaults: rope_theta is unchanged; original_max_position_embeddings is the context of the phase
    before.
    """
    where = f"{origin}: phase {phase.name}: rope_scaling"
    before = config.rope
    if isinstance(before, tuple):
        raise UserError(f"{where} does not support a model with RoPE per layer; leave it out")
    given = phase.rope_scaling or {}
    kept: dict[str, Any] = {
        "rope_theta": before.rope_theta,
        "original_max_position_embeddings": before.original_max_position_embeddings
        or config.max_position_embeddings,
    }
    raw = {key: value for key, value in kept.items() if key not in given} | {"rope_scaling": given}
    changed = {
        rope_from_hf(
            JsonFields(raw, where),
            model_type=config.model_type,
            dim=dim,
            context=longest,
            interleave=before.rope_interleave,
        )
        for dim in {layer.rope_dim for layer in distinct(config.attention)}
    }
    return changed.pop()  # widths are checked, and nothing else depends on them


def check_recipe(
    config: ModelConfig, recipe: Recipe, origin: str, teacher: Path | None = None
) -> list[ModelConfig]:
    """Validate `recipe` against the model `config`, except for data; returns the config of each
    phase. Raises UserError naming phase or key.
    """
    check_stages(config, recipe, origin)
    check_lora(config, recipe, origin)
    check_trainable(config, recipe, origin)
    if recipe.distillation is not None:
        assert teacher is not None
        check_teacher(config, teacher, recipe, origin)
    check_parallel(config, recipe, origin)
    _check_grpo(config, recipe, origin)
    return phase_configs(config, recipe, origin)


def _check_grpo(config: ModelConfig, recipe: Recipe, origin: str) -> None:
    """Raises UserError naming the key that a GRPO phase of `recipe` does not support."""
    for phase in recipe.phase:
        if phase.grpo is None:
            continue
        where = f"{origin}: phase {phase.name}: grpo"
        if (kind := _unsupported_by_grpo(config)) is not None:
            raise UserError(
                f"{where} does not support the {kind} of this model; choose another base_model"
            )
        if recipe.precision != "bf16" or recipe.device != "cpu":
            raise UserError(
                f"{where} samples in bf16 on the CPU; set precision 'bf16', device 'cpu'"
            )
        if recipe.parallel.processes > recipe.parallel.data or recipe.parallel.expert > 1:
            raise UserError(
                f"{where} divides batches alone; of [parallel], leave all sizes but data at 1"
            )
        if recipe.distillation is not None:
            raise UserError(f"{where} learns from rewards; remove distillation")
        if phase.grpo.beta > 0 and recipe.base_model is None:
            raise UserError(f"{where}: beta needs base_model, the reference; set it, or beta = 0")


def _unsupported_by_grpo(config: ModelConfig) -> str | None:
    """Attention without native kernels that keep activations, or without a backward pass."""
    if config.is_sparse:
        return "sparse attention (DSA)"
    for layer in distinct(config.attention):
        if isinstance(layer, TPAConfig):
            return "TPA"
        if isinstance(layer, MLAConfig) and layer.attn_output_gate:
            return "gated MLA"
    return None


def check_teacher(config: ModelConfig, path: Path, recipe: Recipe, origin: str) -> None:
    """Raises UserError naming the key if the teacher at `path` does not suit `recipe` and the
    student's `config`.
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
            raise UserError(f"{where}: distillation does not support z_weight; leave it out")
        if phase.sequence_length > teacher.max_position_embeddings:
            raise UserError(
                f"{where}: sequence_length {phase.sequence_length} exceeds the teacher's context "
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
