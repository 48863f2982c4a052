"""What a recipe reads: the model's config, phase by phase, and the rows of its data.

Owns everything that can be wrong with them, found before anything is built or trained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lowlat.checkpoint.index import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.checkpoint.mapping import settle_mtp
from lowlat.checkpoint.save import text_files
from lowlat.config.attention import distinct
from lowlat.config.families import LOWLAT
from lowlat.config.fields import Fields
from lowlat.config.hf import config_from_hf
from lowlat.config.hf_rope import rope_from_hf
from lowlat.config.model import ModelConfig, RopeConfig
from lowlat.data.chat_rows import ChatRows
from lowlat.data.folder import TokenFolder
from lowlat.data.layout import TOKENIZER_FILE, Split
from lowlat.data.shuffle import mixed
from lowlat.data.windows import Windows
from lowlat.train.parallel.check import check_parallel
from lowlat.train.recipe.schedule import data_begins, data_of
from lowlat.train.recipe.schema import Phase, Recipe
from lowlat.train.run.teacher_check import check_teacher
from lowlat.train.step.lora import check_lora
from lowlat.train.step.trainable import check_trainable
from lowlat.utils.errors import UserError

NULLABLE = ("q_lora_rank", "sliding_window")
"""Fields of config.json that must be null where they have no value, which TOML cannot say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseData:
    """The rows of one phase: windows of text, or whole chats."""

    folder: TokenFolder
    train: Windows | ChatRows
    held_out: Windows | ChatRows | None
    """None where there is nothing to evaluate on."""
    no_evaluation: str = ""
    """Why that is so, and the remedy."""
    document_masks: bool = False
    """Whether the documents of a row do not see one another, and their first tokens are no targets.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """A recipe's config and data, one of each per phase."""

    configs: list[ModelConfig]
    data: list[PhaseData]


def open_inputs(
    recipe: Recipe, base_model: Path | None, base: Path, origin: str, teacher: Path | None = None
) -> Inputs:
    """Read and check everything but the tokens themselves.

    base_model, teacher: the files behind recipe.base_model and recipe.distillation; base: where relative
    paths begin; origin: the recipe's name in errors. Raises UserError naming phase, key or file.
    """
    folders = [phase_folder(recipe, index, base) for index in range(len(recipe.phase))]
    _check_same_tokenizer(folders, recipe, origin)
    config = base_config(recipe, base_model, folders[0].vocab_size, origin)
    configs = check_recipe(config, recipe, origin, teacher)
    for model in (teacher, base_model):
        if model is not None:
            _check_same_vocabulary(model, folders[0], origin)
    num_ahead = 1 + config.num_nextn_predict_layers
    data = [phase_data(recipe, i, folder, num_ahead) for i, folder in enumerate(folders)]
    _check_targets(recipe, data, origin)
    return Inputs(configs=configs, data=data)


def check_recipe(
    config: ModelConfig, recipe: Recipe, origin: str, teacher: Path | None = None
) -> list[ModelConfig]:
    """Whether a model of `config` can be trained as `recipe` says, whatever its data; its config in
    every phase. Raises UserError naming phase or key.
    """
    check_lora(config, recipe, origin)
    check_trainable(config, recipe, origin)
    if recipe.distillation is not None:
        assert teacher is not None
        check_teacher(config, teacher, recipe, origin)
    check_parallel(config, recipe, origin)
    return phase_configs(config, recipe, origin)


def base_config(recipe: Recipe, base_model: Path | None, vocab_size: int, origin: str) -> ModelConfig:
    """The model's config before any phase changes it. Raises UserError naming the field."""
    if base_model is not None:
        source = open_checkpoint(base_model)
        config = settle_mtp(read_config(source), source)
        config = replace(config, quantization=None, packing=None)
    else:
        absent = dict.fromkeys(NULLABLE) if (recipe.model or {}).get("model_type") != LOWLAT else {}
        raw = {"vocab_size": vocab_size, **absent, **(recipe.model or {})}
        config = config_from_hf(raw, source=f"{origin}: [model]")
        if config.quantization is not None or config.packing is not None:
            raise UserError(
                f"{origin}: [model]: quantization_config says how a checkpoint is stored; leave it "
                "out (precision = 'fp8' trains in FP8, train export --dtype fp8 stores it)"
            )
    if config.vocab_size < vocab_size:
        raise UserError(
            f"{origin}: the data has {vocab_size} token ids, but the model's vocab_size is "
            f"{config.vocab_size}; leave vocab_size out or tokenise with the model's tokenizer"
        )
    return config


def phase_configs(config: ModelConfig, recipe: Recipe, origin: str) -> list[ModelConfig]:
    """The model's config in every phase: what one changes about positions holds for those after it.

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
            f"{origin}: phase {phase.name}: sequence_length {phase.sequence_length} is beyond "
            f"max_position_embeddings {longest}; raise that"
        )
    rope = config.rope if phase.rope_scaling is None else _changed_rope(config, phase, longest, origin)
    return replace(config, rope=rope, max_position_embeddings=longest)


def _changed_rope(config: ModelConfig, phase: Phase, longest: int, origin: str) -> RopeConfig:
    """What the phase gives as config.json's rope_scaling. Unless it says otherwise rope_theta
    stays, and the context before extension is that of the phase before.
    """
    where = f"{origin}: phase {phase.name}: rope_scaling"
    before = config.rope
    if isinstance(before, tuple):
        raise UserError(f"{where} cannot say what each layer has for itself; leave it out")
    given = phase.rope_scaling or {}
    kept: dict[str, Any] = {
        "rope_theta": before.rope_theta,
        "original_max_position_embeddings": before.original_max_position_embeddings
        or config.max_position_embeddings,
    }
    raw = {key: value for key, value in kept.items() if key not in given} | {"rope_scaling": given}
    changed = {
        rope_from_hf(
            Fields(raw, where),
            model_type=config.model_type,
            dim=dim,
            context=longest,
            interleave=before.rope_interleave,
        )
        for dim in {layer.rope_dim for layer in distinct(config.attention)}
    }
    return changed.pop()  # widths are checked, and nothing else depends on them


def _check_same_tokenizer(folders: Sequence[TokenFolder], recipe: Recipe, origin: str) -> None:
    """All phases' `folders` hold ids of one tokenizer. Raises UserError naming the phase."""
    for folder, phase in zip(folders, recipe.phase, strict=True):
        if folder.facts.tokenizer[TOKENIZER_FILE] != folders[0].facts.tokenizer[TOKENIZER_FILE]:
            raise UserError(
                f"{origin}: phase {phase.name}: {folder.path} was built with another tokenizer "
                f"than {folders[0].path}; build it again with that one"
            )


def _check_same_vocabulary(base_model: Path, folder: TokenFolder, origin: str) -> None:
    """The ids of the data in `folder` mean to the checkpoint `base_model` what they mean there, as far
    as it has a tokenizer. Raises UserError.
    """
    file = text_files(base_model).get(TOKENIZER_FILE)
    if file is None:
        return
    both = (file, (folder.path / TOKENIZER_FILE).read_bytes())
    known, used = (tokenizers.Tokenizer.from_buffer(data).get_vocab() for data in both)
    tokens = {id: token for token, id in known.items()}
    if any(tokens.get(id, token) != token for token, id in used.items()):
        raise UserError(
            f"{origin}: {folder.path} was built with another tokenizer than that of {base_model}; build "
            "it again with that one"
        )


def phase_folder(recipe: Recipe, index: int, base: Path) -> TokenFolder:
    """The token folder of phase `index`; paths in the recipe start at `base`. Raises UserError."""
    return TokenFolder.open(base / data_of(recipe, index).folder)


def phase_data(recipe: Recipe, index: int, folder: TokenFolder, num_ahead: int) -> PhaseData:
    """The rows of phase `index` in its `folder`. Raises UserError where there are none."""
    phase, table = recipe.phase[index], data_of(recipe, index)

    def rows(split: Split, seed: int, fim_rate: float) -> Windows | ChatRows:
        kind = ChatRows if folder.has_mask(split) else Windows
        return kind(
            folder,
            split=split,
            sequence_length=phase.sequence_length,
            num_ahead=num_ahead,
            seed=seed,
            document_masks=table.document_masks,
            fim_rate=fim_rate,
        )

    train = rows("train", _order(recipe, index), table.fim_rate)
    enough = folder.num_tokens("held_out") >= phase.sequence_length + num_ahead
    held_out = rows("held_out", 0, 0.0) if enough or folder.has_mask("held_out") else None
    why = ""
    if held_out is None:
        why = f"{folder.path} holds out less than a row; build it with --held-out"
    elif not held_out.has_targets(recipe.evaluation.sequences):
        held_out = None
        why = (
            f"the held-out rows of {folder.path} hold no target; raise sequence_length "
            f"({phase.sequence_length}) or build it with more documents held out"
        )
    return PhaseData(
        folder=folder,
        train=train,
        held_out=held_out,
        no_evaluation=why,
        document_masks=table.document_masks,
    )


def _check_targets(recipe: Recipe, data: Sequence[PhaseData], origin: str) -> None:
    """Every phase has something to learn. Raises UserError naming the one that has not."""
    for phase, own in zip(recipe.phase, data, strict=True):
        if own.train.has_targets():
            continue
        where = f"{origin}: phase {phase.name}: no row of {own.folder.path} holds a target"
        if isinstance(own.train, ChatRows) and own.train.left_out.chats:
            raise UserError(
                f"{where}: every answer lies beyond sequence_length {phase.sequence_length}; "
                f"sequence_length = {own.train.left_out.longest - 1} holds all"
            )
        raise UserError(f"{where}; build it from texts, or from chats with answers")


def left_out(recipe: Recipe, data: Sequence[PhaseData]) -> Iterator[str]:
    """What each phase of `recipe` does without in its `data`, a line each."""
    for phase, own in zip(recipe.phase, data, strict=True):
        if own.held_out is None:
            yield f"phase {phase.name}: no evaluations, {own.no_evaluation}"
        if isinstance(own.train, ChatRows) and own.train.left_out.chats:
            left = own.train.left_out
            yield (
                f"phase {phase.name}: {left.chats:,} of {own.folder.num_documents('train'):,} "
                f"chats are longer than a row; their last {left.tokens:,} tokens are not learned; "
                f"sequence_length = {left.longest - 1} holds all"
            )


def _order(recipe: Recipe, index: int) -> int:
    """The seed of the order in which phase `index` reads: that of the phase whose data it goes on
    in, and for data that begins anew one of its own, which no other seed of a recipe has as its.
    """
    first = data_begins(recipe, index)
    return int(mixed(np.array([first]), recipe.seed)[0]) if first else recipe.seed
