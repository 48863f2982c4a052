"""GGUF files of architectures minicpm3 and mistral4, as llama.cpp's converter writes them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.checkpoint.gguf.tensor_layout import LONG_FACTORS, SHORT_FACTORS
from lowlat.checkpoint.load import load_model
from lowlat.config.model import ModelConfig
from lowlat.utils.errors import UserError
from tests.configs import INTERLEAVED, YARN

from .builders import MISTRAL4_MOE, PLAIN, mla, random_model
from .gguf_files import write_gguf

MINICPM3 = mla(
    "minicpm3",
    moe=None,
    rope=PLAIN,
    hidden_size=21,
    scale_emb=12.0,
    scale_depth=1.4,
    dim_model_base=256,
)
"""The hidden size is that of all heads' values, which is the default of value_length."""
MISTRAL4 = mla("mistral4", moe=MISTRAL4_MOE)
SCALED = replace(YARN, llama_4_scaling_beta=0.1)
FACTORS = {SHORT_FACTORS: torch.tensor([1.0, 2.0, 3.0]), LONG_FACTORS: torch.tensor([4.0, 5, 6])}


def written(tmp_path: Path, config: ModelConfig, **options: Any) -> dict[str, torch.Tensor]:
    """Writes m.gguf; returns its parameters."""
    model = random_model(config, dtype=torch.float32)
    write_gguf(tmp_path / "m.gguf", config, model.state_dict(), **options)
    return model.state_dict()


@pytest.mark.parametrize("has_value_length", [True, False])
def test_minicpm3(tmp_path: Path, has_value_length: bool) -> None:
    keys = {} if has_value_length else {"minicpm3.attention.value_length": None}
    parameters = written(tmp_path, MINICPM3, keys=keys)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.config == MINICPM3
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in parameters.items())


@pytest.mark.parametrize("original", [None, 100])
def test_factors_of_minicpm3(tmp_path: Path, original: int | None) -> None:
    """Without a key of their own, the short factors hold for the whole context."""
    key = {} if original is None else {"rope.scaling.original_context_length": original}
    keys = {f"minicpm3.{name}": value for name, value in key.items()}
    written(tmp_path, MINICPM3, keys=keys, extra=FACTORS)
    config = load_model(tmp_path / "m.gguf").config
    rope, context = config.rope_of(0), config.max_position_embeddings
    assert (rope.pair_factors, rope.long_pair_factors) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    assert rope.original_max_position_embeddings == (original or context)
    assert rope.attention_factor == 1.0
    served = rope.for_context(context).pair_factors
    assert served == ((1.0, 2.0, 3.0) if original is None else (4.0, 5.0, 6.0))


@pytest.mark.parametrize("split", [False, True])
def test_mistral4(tmp_path: Path, split: bool) -> None:
    parameters = written(tmp_path, MISTRAL4, split_kv_b=split)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.config == MISTRAL4
    found = loaded.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in parameters.items())


YARN_KEYS = {
    "mistral4.rope.scaling.type": "yarn",
    "mistral4.rope.scaling.factor": 4.0,
    "mistral4.rope.scaling.original_context_length": 128,
    "mistral4.rope.scaling.yarn_log_multiplier": 0.07,
}
TEMPERATURE = {
    "mistral4.attention.temperature_scale": 0.1,
    "mistral4.attention.temperature_length": 128,
}


def test_scaled_queries_of_mistral4(tmp_path: Path) -> None:
    written(tmp_path, MISTRAL4, keys=YARN_KEYS | TEMPERATURE)
    assert load_model(tmp_path / "m.gguf").config.rope_of(0) == SCALED
    plain = tmp_path / "plain"
    plain.mkdir()
    written(plain, MISTRAL4, keys=TEMPERATURE)
    wanted = replace(INTERLEAVED, llama_4_scaling_beta=0.1, original_max_position_embeddings=128)
    assert load_model(plain / "m.gguf").config.rope_of(0) == wanted


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        (
            MISTRAL4,
            YARN_KEYS | TEMPERATURE | {"mistral4.attention.temperature_length": 64},
            "temperature_length' is 64, not rope.scaling.original_context_length",
        ),
        (MISTRAL4, {"mistral4.attention.temperature_scale": 0.1}, "temperature_length' is 0"),
        (MISTRAL4, {"mistral4.expert_gating_func": 2}, "sigmoid is not supported in mistral4"),
        (MINICPM3, {"minicpm3.rope.scaling.type": "yarn"}, "not none or longrope"),
        (MINICPM3, {"minicpm3.attention.head_count_kv": 1}, "head_count_kv' must be 3"),
        (MINICPM3, {"minicpm3.attention.key_length": 5}, "5 is less than the rope width 6"),
        (MINICPM3, {"minicpm3.logit_scale": 0.5}, "logit_scale' is unknown"),
    ],
)
def test_keys_with_effect(
    tmp_path: Path, config: ModelConfig, keys: dict[str, Any], message: str
) -> None:
    written(tmp_path, config, keys=keys)
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "m.gguf")


def test_half_of_the_factors_is_an_error(tmp_path: Path) -> None:
    written(tmp_path, MINICPM3, extra={SHORT_FACTORS: FACTORS[SHORT_FACTORS]})
    with pytest.raises(UserError, match="rope_factors_long"):
        load_model(tmp_path / "m.gguf")
