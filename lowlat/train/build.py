"""A recipe's model and its data, phase by phase: config, weights, optimiser, windows.

Owns how a recipe becomes objects; what is done with them is `trainer`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from lowlat.checkpoint.index import open_checkpoint
from lowlat.checkpoint.load import load_model, read_config
from lowlat.checkpoint.mapping import settle_mtp
from lowlat.checkpoint.save import text_files
from lowlat.config.families import LOWLAT
from lowlat.config.fields import Fields
from lowlat.config.hf import config_from_hf
from lowlat.config.hf_rope import rope_from_hf
from lowlat.config.model import ModelConfig, RopeConfig
from lowlat.model.block import DecoderLayer
from lowlat.model.init import init_weights
from lowlat.model.stacking import stack_experts
from lowlat.model.transformer import Transformer
from lowlat.train.data.folder import TokenFolder
from lowlat.train.data.layout import TOKENIZER_FILE
from lowlat.train.data.windows import Windows
from lowlat.train.fp8 import use_fp8
from lowlat.train.lora import add_updates, base_dtype
from lowlat.train.optim import Optimizer
from lowlat.train.parallel.layout import Layout, lay_out
from lowlat.train.parallel.team import Team
from lowlat.train.passes import Passes, PlainPasses
from lowlat.train.recipe import Data, Phase, Recipe
from lowlat.utils.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
"""Of activations, by precision."""
NULLABLE = ("q_lora_rank", "sliding_window")
"""Fields of config.json that must be null where they have no value, which TOML cannot say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseData:
    """The windows of one phase."""

    folder: TokenFolder
    train: Windows
    held_out: Windows | None
    """None where no document was held out."""


def base_config(recipe: Recipe, start: Path | None, vocab_size: int, origin: str) -> ModelConfig:
    """The model's config before any phase changes it. Raises UserError naming the field."""
    if start is not None:
        source = open_checkpoint(start)
        config = settle_mtp(read_config(source), source)
        if config.quantization is not None:
            config = replace(config, quantization=None)
    else:
        absent = dict.fromkeys(NULLABLE) if (recipe.model or {}).get("model_type") != LOWLAT else {}
        raw = {"vocab_size": vocab_size, **absent, **(recipe.model or {})}
        config = config_from_hf(raw, source=f"{origin}: [model]")
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
    rope = config.rope if phase.rope is None else _changed_rope(config, phase, longest, origin)
    return replace(config, rope=rope, max_position_embeddings=longest)


def _changed_rope(config: ModelConfig, phase: Phase, longest: int, origin: str) -> RopeConfig:
    """What the phase gives as config.json's rope_scaling. Unless it says otherwise rope_theta
    stays, and the context before extension is that of the phase before.
    """
    given = phase.rope or {}
    kept: dict[str, Any] = {
        "rope_theta": config.rope.rope_theta,
        "original_max_position_embeddings": config.rope.original_max_position_embeddings
        or config.max_position_embeddings,
    }
    raw = {key: value for key, value in kept.items() if key not in given} | {"rope_scaling": given}
    return rope_from_hf(
        Fields(raw, f"{origin}: phase {phase.name}: rope"),
        model_type=config.model_type,
        dim=config.attention.rope_dim,
        context=longest,
        interleave=config.rope.rope_interleave,
    )


def check_same_tokenizer(folders: Sequence[TokenFolder], recipe: Recipe, origin: str) -> None:
    """All phases' `folders` hold ids of one tokenizer. Raises UserError naming the phase."""
    for folder, phase in zip(folders, recipe.phase, strict=True):
        if folder.facts.tokenizer[TOKENIZER_FILE] != folders[0].facts.tokenizer[TOKENIZER_FILE]:
            raise UserError(
                f"{origin}: phase {phase.name}: {folder.path} was built with another tokenizer "
                f"than {folders[0].path}; build it again with that one"
            )


def check_start_tokenizer(start: Path, folder: TokenFolder, origin: str) -> None:
    """The ids of the data in `folder` mean to the checkpoint `start` what they mean there, as far
    as it has a tokenizer. Raises UserError.
    """
    file = text_files(start).get(TOKENIZER_FILE)
    if file is None:
        return
    both = (file, (folder.path / TOKENIZER_FILE).read_bytes())
    known, used = (tokenizers.Tokenizer.from_buffer(data).get_vocab() for data in both)
    tokens = {id: token for token, id in known.items()}
    if any(tokens.get(id, token) != token for token, id in used.items()):
        raise UserError(
            f"{origin}: {folder.path} was built with another tokenizer than that of {start}; build "
            "it again with that one"
        )


def phase_data(recipe: Recipe, index: int, base: Path, num_ahead: int) -> PhaseData:
    """The windows of phase `index`; paths in the recipe start at `base`. Raises UserError."""
    phase = recipe.phase[index]
    table: Data = phase.data or recipe.data
    folder = TokenFolder.open(base / table.folder)
    shared = {"sequence_length": phase.sequence_length, "num_ahead": num_ahead}
    train = Windows(
        folder,
        split="train",
        seed=recipe.seed + index,
        document_masks=table.document_masks,
        fim_rate=table.fim_rate,
        **shared,
    )
    held_out = None
    if folder.num_tokens("held_out") >= phase.sequence_length + num_ahead:
        held_out = Windows(
            folder,
            split="held_out",
            seed=0,
            document_masks=table.document_masks,
            fim_rate=0.0,
            **shared,
        )
    return PhaseData(folder=folder, train=train, held_out=held_out)


def new_model(
    config: ModelConfig, recipe: Recipe, start: Path | None, weights: Mapping[str, Tensor] | None
) -> Transformer:
    """The whole model with fp32 weights on the CPU: `weights` if given, else those of `start`, else
    new ones. With LoRA those of `start` in the products' dtype, and `weights` are its updates.
    They may be views of files: `parallel.layout.lay_out` gives them memory.
    """
    if recipe.lora is not None:
        assert start is not None
        model = started(start, config, base_dtype(recipe))
        add_updates(model, recipe.lora, seed=recipe.seed, origin=recipe.name)
        model.load_state_dict(weights or {}, strict=False, assign=True)
    elif weights is not None:
        with torch.device("meta"):
            model = Transformer(config)
            stack_experts(model)
        state = {name: weights[name] for name in model.state_dict()}
        model.load_state_dict(state, assign=True)
    elif start is not None:
        model = started(start, config, "fp32")
    else:
        model = Transformer(config)
        init_weights(model, seed=recipe.seed)
        stack_experts(model)
    if recipe.precision == "fp8":
        use_fp8(model)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            module.recompute = recipe.recompute == "layers"
    return model


def new_passes(
    model: Transformer, team: Team, *, device: str, dtype: torch.dtype, sequence_length: int
) -> tuple[Passes, Layout]:
    """Lay out `model`, which is whole, over `team`; passes over it with activations of `dtype`."""
    if team.size("pipeline") == 1:
        layout = lay_out(model, team, device=device, dtype=dtype)
        return PlainPasses(model, dtype, team), layout
    # Seconds of imports that no other run needs.
    from lowlat.train.parallel.pipeline import PipelinePasses

    passes = PipelinePasses(model, team, dtype=dtype, sequence_length=sequence_length)
    layout = lay_out(
        model, team, device=device, dtype=dtype, roots=passes.modules, copies=passes.copies
    )
    return passes, layout


def new_optimizer(
    model: Transformer, recipe: Recipe, tensors: Mapping[str, Tensor] | None, layout: Layout
) -> Optimizer:
    """The optimiser, with the (whole) state in `tensors` if given."""
    optimizer = Optimizer(model, recipe.optimizer, layout)
    if tensors:
        optimizer.load(tensors)
    return optimizer


def started(start: Path, config: ModelConfig, dtype: str) -> Transformer:
    """The weights of the checkpoint `start` in `dtype`, experts stacked, in a model of `config`,
    which may say other things about positions.
    """
    loaded = load_model(start, dtype=dtype).model
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    stack_experts(model)
    return model
