"""Exactly converted folders, in transformers and in lowlat, give the logits of their source."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from lowlat.checkpoint.load import load_model
from lowlat.convert.run import convert
from lowlat.model.transformer import Transformer
from tests.packed_attention import PackedAttention

from .oracle import randomise

POSITIONS = torch.cat([torch.arange(13), torch.arange(4_987, 5_000), torch.arange(99_987, 100_000)])
NEW_TOKENS = 11
TOLERANCE = {torch.float32: 1e-5, torch.float64: 2e-6}
"""Of the largest logit. fp64 is bounded by norms and rotary tables, which stay fp32."""
CONTEXT = 131_072
DEFAULT = {"rope_type": "default", "rope_theta": 1e5}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One model to convert."""

    name: str
    config: type[PreTrainedConfig] = LlamaConfig
    heads: int = 6
    groups: int = 3
    rope: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT))
    more: dict[str, Any] = field(default_factory=dict)


SOURCES = [
    Source(name="gqa"),
    Source(name="mha", groups=6),
    Source(name="mqa", groups=1),
    Source(name="tied", more={"tie_word_embeddings": True}),
    Source(name="attention_bias", more={"attention_bias": True}),
    Source(name="mistral", config=MistralConfig, more={"sliding_window": None}),
    Source(name="qwen2", config=Qwen2Config),
    Source(name="qwen2-mqa", config=Qwen2Config, groups=1, rope={**DEFAULT, "rope_theta": 1e6}),
    Source(
        name="llama3",
        rope={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
    ),
    Source(
        name="yarn",
        rope={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 16.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    Source(name="linear", rope={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
]


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """The source in fp32 as transformers saves it, and its conversion."""
    source: Source = request.param
    config = source.config(
        vocab_size=101,
        hidden_size=66,
        intermediate_size=67,
        num_hidden_layers=2,
        num_attention_heads=source.heads,
        num_key_value_heads=source.groups,
        head_dim=22,
        max_position_embeddings=CONTEXT,
        rope_parameters=dict(source.rope),
        bos_token_id=None,
        eos_token_id=None,
        **{"tie_word_embeddings": False, **source.more},
    )
    model = AutoModelForCausalLM.from_config(config).float()
    randomise(model, torch.Generator().manual_seed(17), 0.0)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "mla", to="mla")
    return tmp_path / "source", tmp_path / "mla"


def reference(
    folder: Path, dtype: torch.dtype = torch.float32, attention: str = "eager"
) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention
    ).eval()


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, positions: Tensor = POSITIONS) -> Tensor:
    """The mask is explicit: without one, a jump in positions begins another sequence."""
    mask = torch.ones(1, len(ids), dtype=torch.long)
    out = model(ids[None], position_ids=positions[None], attention_mask=mask, use_cache=False)
    return out.logits[0]


@torch.no_grad()
def own_logits(model: Transformer, ids: Tensor, positions: Tensor) -> Tensor:
    return model.logits(model(ids, positions, PackedAttention([len(ids)])))


def own_greedy(model: Transformer, ids: Tensor) -> list[int]:
    for _ in range(NEW_TOKENS):
        last = own_logits(model, ids, torch.arange(len(ids)))[-1]
        ids = torch.cat([ids, last.argmax()[None]])
    return ids.tolist()


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def prompt() -> Tensor:
    return torch.randint(0, 101, (len(POSITIONS),), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("dtype", "attention"),
    [(torch.float32, "eager"), (torch.float32, "sdpa"), (torch.float64, "eager")],
    ids=["fp32-eager", "fp32-sdpa", "fp64-eager"],
)
def test_transformers_gives_the_logits_of_the_source(
    folders: tuple[Path, Path],
    dtype: torch.dtype,
    attention: str,
    record_property: Callable[[str, object], None],
) -> None:
    """Positions to 100,000; regression: scale, repeated frequencies, latent norm, biases.

    Eager fp32 may agree to the bit: the zeros of wide queries change no sum in its order.
    """
    source, converted = (reference(folder, dtype, attention) for folder in folders)
    assert type(converted).__name__ == "DeepseekV3ForCausalLM"
    wanted = logits(source, prompt())
    error = relative(logits(converted, prompt()), wanted)
    record_property("relative_difference", error)
    assert error < TOLERANCE[dtype]
    # far positions matter: near ones give other logits
    assert relative(logits(source, prompt(), torch.arange(len(POSITIONS))), wanted) > 0.01


def test_transformers_greedy_continuation_is_the_same(folders: tuple[Path, Path]) -> None:
    """Through transformers' own cache, which keeps the padded latent."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    source, converted = (
        reference(folder).generate(prompt()[None], **options) for folder in folders
    )
    assert source.shape[1] == len(POSITIONS) + NEW_TOKENS
    assert torch.equal(source, converted)


def test_lowlat_gives_the_logits_and_the_greedy_continuation_of_the_source(
    folders: tuple[Path, Path], record_property: Callable[[str, object], None]
) -> None:
    source, converted = (load_model(folder) for folder in folders)
    assert converted.config.attention.entry_dim == source.config.attention.entry_dim
    assert converted.config.softmax_scale_of(0) == pytest.approx(
        source.config.softmax_scale_of(0), rel=3e-16
    )
    wanted = own_logits(source.model, prompt(), POSITIONS)
    error = relative(own_logits(converted.model, prompt(), POSITIONS), wanted)
    record_property("relative_difference", error)
    assert error < TOLERANCE[torch.float32]
    theirs = logits(reference(folders[1]), prompt())
    assert relative(wanted, theirs) < TOLERANCE[torch.float32]
    assert own_greedy(converted.model, prompt()) == own_greedy(source.model, prompt())


def without_scale(rope: dict[str, Any]) -> None:
    rope["mscale_all_dim"] = 0.0


def one_unit_faster(rope: dict[str, Any]) -> None:
    """One pair's divisor, one unit in the last place larger."""
    divisors = rope["short_factor"]
    wider = torch.nextafter(torch.tensor(divisors[1]), torch.tensor(torch.inf)).item()
    rope["short_factor"] = rope["long_factor"] = [divisors[0], wider, *divisors[2:]]


def interleaved_groups(rope: dict[str, Any]) -> None:
    """Pairs ordered by frequency first, group second."""
    by_group = torch.tensor(rope["short_factor"]).view(3, -1)
    rope["short_factor"] = rope["long_factor"] = by_group.T.flatten().tolist()


@pytest.mark.parametrize("folders", [SOURCES[0]], indirect=True, ids=["gqa"])
@pytest.mark.parametrize("mistake", [without_scale, one_unit_faster, interleaved_groups])
def test_the_comparison_sees_mistakes(
    folders: tuple[Path, Path], mistake: Callable[[dict[str, Any]], None]
) -> None:
    """Regression: a comparison that passes whatever the converted config says."""
    wanted = logits(reference(folders[0]), prompt())
    path = folders[1] / "config.json"
    raw = json.loads(path.read_text())
    mistake(raw["rope_scaling"])
    path.write_text(json.dumps(raw))
    error = relative(logits(reference(folders[1]), prompt()), wanted)
    assert error > 20 * TOLERANCE[torch.float32]
