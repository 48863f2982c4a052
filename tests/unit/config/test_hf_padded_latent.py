"""The "lowlat" object of exactly converted models."""

from dataclasses import replace
from typing import Any

import pytest

from lowlat.config.hf.padded_latent import padded_rank
from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.utils.errors import UserError
from tests.configs import MLA

from .files import LLAMA, V3, refusal


def converted(q_bias: bool = False, o_bias: bool = False, rank: int = 130) -> ModelConfig:
    """A dense model with a latent of `rank` channels and no norm on it."""
    plain = config_from_hf(V3 | {"first_k_dense_replace": 5, "rope_interleave": False})
    attention = replace(
        MLA,
        kv_lora_rank=rank,
        q_lora_rank=None,
        qk_nope_head_dim=0,
        v_head_dim=11,
        attention_bias=q_bias,
        q_bias=q_bias,
        o_bias=o_bias,
        kv_a_layernorm=False,
    )
    return replace(plain, attention=attention)


@pytest.mark.parametrize(
    ("rank", "padded"),
    [(1, 64), (63, 64), (64, 128), (126, 128), (127, 192), (192, 256), (384, 448)],
)
def test_padded_rank_has_one_constant_channel_in_64(rank: int, padded: int):
    assert padded_rank(rank) == padded
    assert padded - padded // 64 >= rank


@pytest.mark.parametrize("q_bias", [False, True])
@pytest.mark.parametrize("o_bias", [False, True])
def test_both_descriptions_are_written_and_the_native_one_is_read(q_bias: bool, o_bias: bool):
    config = converted(q_bias, o_bias)
    raw = config_to_hf(config)
    assert raw["lowlat"] == {
        "kv_lora_rank": 130,
        "kv_a_layernorm": False,
        "q_bias": q_bias,
        "o_bias": o_bias,
    }
    assert (raw["kv_lora_rank"], raw["attention_bias"]) == (192, True)
    assert raw["q_lora_rank"] == (64 if q_bias else None)
    assert config_from_hf(raw) == config


def test_standard_readers_see_a_standard_model():
    raw = config_to_hf(converted())
    del raw["lowlat"]
    attention = config_from_hf(raw).attention
    assert isinstance(attention, MLAConfig)
    assert (attention.kv_lora_rank, attention.attention_bias) == (192, True)
    assert attention.kv_a_layernorm and not attention.q_bias


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lowlat": {"rank": 3}}, "lowlat.rank"),
        ({"lowlat": {"rank": None}}, "lowlat.rank"),
        ({"lowlat": {"kv_lora_rank": None}}, "lowlat.kv_lora_rank"),
        ({"lowlat": {"kv_lora_rank": 127}}, None),
        ({"lowlat": {"kv_lora_rank": 126}}, "kv_lora_rank"),
        ({"lowlat": {"kv_a_layernorm": True}}, "lowlat.kv_a_layernorm"),
        ({"lowlat": {"q_bias": True}}, "q_lora_rank"),
        ({"lowlat": {"o_bias": 0}}, "lowlat.o_bias"),
        ({"attention_bias": False}, "attention_bias"),
        ({"kv_lora_rank": 256}, "kv_lora_rank"),
        ({"q_lora_rank": 64}, "q_lora_rank"),
    ],
)
def test_the_two_descriptions_must_agree(change: dict[str, Any], name: str | None):
    raw = config_to_hf(converted())
    inner = raw["lowlat"] | change.get("lowlat", {})
    raw |= change | {"lowlat": inner}
    if name is None:
        config_from_hf(raw)
    else:
        assert name in refusal(raw)


def test_the_object_needs_all_its_keys_and_its_family():
    raw = config_to_hf(converted())
    for key in raw["lowlat"]:
        rest = {k: v for k, v in raw["lowlat"].items() if k != key}
        assert f"lowlat.{key} is missing" in refusal(raw | {"lowlat": rest})
    assert "lowlat" in refusal(raw | {"model_type": "kimi_k2"})
    assert "lowlat" in refusal(LLAMA | {"lowlat": raw["lowlat"]})
    assert "lowlat" in refusal(raw | {"lowlat": [1]})


def test_biases_that_the_object_cannot_express():
    config = converted()
    assert isinstance(config.attention, MLAConfig)
    for change in ({"attention_bias": True}, {"q_bias": True}, {"q_lora_rank": 5}):
        with pytest.raises(UserError, match="converted model"):
            config_to_hf(replace(config, attention=replace(config.attention, **change)))


@pytest.mark.parametrize("q_bias", [False, True])
def test_transformers_loads_the_standard_numbers_and_keeps_the_object(q_bias: bool):
    transformers = pytest.importorskip("transformers")
    config = converted(q_bias)
    loaded = transformers.DeepseekV3Config.from_dict(config_to_hf(config))
    assert (loaded.kv_lora_rank, loaded.attention_bias) == (192, True)
    assert loaded.q_lora_rank == (64 if q_bias else None)
    assert config_from_hf(loaded.to_dict() | {"dtype": None}) == config
