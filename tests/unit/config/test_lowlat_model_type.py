"""config.json of model_type "lowlat": written and read back, and every kind of refusal."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig, QuantConfig, RopeConfig
from lowlat.config.presets import load_preset, preset_names
from lowlat.utils.errors import UserError
from tests.configs import LLAMA3
from tests.lowlat_configs import (
    DIFFERING,
    EVERY,
    GLA,
    GQA,
    LAYER_ROPES,
    LAYERS,
    MLA,
    MOE,
    TPA,
    YARN,
    lowlat_config,
)

FACTORS = tuple(1.0 + i for i in range(5))
ROPES = {
    "linear": RopeConfig(rope_theta=100.0, rope_type="linear", factor=3.0),
    "llama3": replace(LLAMA3, rope_theta=100.0, original_max_position_embeddings=19),
    "longrope": RopeConfig(
        rope_theta=100.0,
        rope_type="longrope",
        factor=2.0,
        original_max_position_embeddings=47,
        attention_factor=1.5,
        pair_factors=FACTORS,
    ),
}
CONFIGS = {
    **EVERY,
    **{name: lowlat_config(GQA, rope=rope) for name, rope in ROPES.items()},
    "fp8": lowlat_config(
        GLA,
        quantization=QuantConfig(
            weight_block_size=(8, 4), scale_fmt="ue8m0", modules_to_not_convert=("o_proj",)
        ),
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_written_and_read_back(config: ModelConfig) -> None:
    written = json.loads(json.dumps(config_to_hf(config), allow_nan=False))
    assert config_from_hf(written) == config
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("name", preset_names())
def test_every_released_model_can_be_expressed(name: str) -> None:
    config = replace(load_preset(name), model_type="lowlat")
    assert config_from_hf(config_to_hf(config)) == config


def test_defaults_may_be_left_out() -> None:
    raw = {
        "model_type": "lowlat",
        "hidden_size": 23,
        "intermediate_size": 31,
        "num_hidden_layers": 2,
        "vocab_size": 263,
        "max_position_embeddings": 97,
        "rms_norm_eps": 1e-5,
        "attention": {
            "form": "gqa",
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 10,
        },
        "rope": {"rope_theta": 100},
    }
    expected = lowlat_config(GQA, initializer_range=0.02, bos_token_id=None, eos_token_ids=())
    assert config_from_hf(raw) == expected


def test_null_may_be_left_out() -> None:
    """Regression: forms that a TOML recipe could not express."""
    config = EVERY["tpa-kv"]
    raw = config_to_hf(config)
    assert raw["attention"].pop("q_rank") is None
    assert config_from_hf(raw) == config


def raw_of(config: ModelConfig, changes: dict[str, Any]) -> dict[str, Any]:
    """The file of `config` with dotted fields replaced; ... removes one."""
    raw = json.loads(json.dumps(config_to_hf(config)))
    for path, value in changes.items():
        *parents, name = path.split(".")
        table = raw
        for parent in parents:
            table = table[parent]
        if value is ...:
            del table[name]
        else:
            table[name] = value
    return raw


def test_layers_that_differ_are_arrays() -> None:
    """One entry per layer, null where a layer has none; equal values are written once."""
    raw = config_to_hf(LAYERS["all"])
    attention, rope = raw["attention"], raw["rope"]
    assert attention["kv_lora_rank"] == [11, 101, 3, 67]
    assert attention["q_lora_rank"] == [None, None, None, 11]
    assert attention["attention_bias"] == [False, False, True, False]
    assert (attention["form"], attention["num_attention_heads"], attention["q_bias"]) == (
        "mla",
        5,
        False,
    )
    assert rope["rope_type"] == ["longrope", "longrope", None, "yarn"]
    assert rope["short_factor"] == [[1.0, 0.25, 7.5], [1.0, 2.0, 5.0, 10.0, 17.0], None, None]
    only = config_to_hf(LAYERS["rope"])
    assert only["attention"]["kv_lora_rank"] == 13 and only["rope"]["rope_theta"] == [100.0, 7.0]


def test_equal_layers_may_be_written_as_arrays() -> None:
    """A uniform model in the per-layer form is the same model."""
    config = lowlat_config(MLA, rope=LAYER_ROPES[0])
    raw = config_to_hf(config)
    raw["attention"] |= {name: [value] * 2 for name, value in raw["attention"].items()}
    raw["attention"] |= {"form": "mla", "num_attention_heads": 5}
    raw["rope"] |= {name: [value] * 2 for name, value in raw["rope"].items()}
    assert config_from_hf(raw) == config


def test_a_setting_of_all_layers_fits_each() -> None:
    """Frequencies given once, for layers of equal rotary width."""
    layers = tuple(replace(layer, qk_rope_head_dim=6) for layer in DIFFERING)
    config = lowlat_config(layers, rope=LAYER_ROPES[0], num_hidden_layers=4)
    raw = config_to_hf(config)
    assert raw["rope"]["short_factor"] == [1.0, 0.25, 7.5]
    assert config_from_hf(raw) == config


DIFFER = LAYERS["all"]
FACTORS_OF_ALL = {"short_factor": [1.0] * 3, "long_factor": [1.0] * 3, "rope_type": "longrope"}
GTA_FILE = EVERY["gta-3"]
REFUSALS: list[tuple[ModelConfig, dict[str, Any], str]] = [
    (GTA_FILE, {"attenton": {}}, "attenton ({}) is unknown"),
    (GTA_FILE, {"attention.kv_lora_rank": 7}, "attention.kv_lora_rank (7) is unknown"),
    (GTA_FILE, {"attention": ...}, "attention is missing"),
    (GTA_FILE, {"attention": 7}, "field 'attention' must be a JSON object"),
    (GTA_FILE, {"attention.form": "mha"}, "attention.form"),
    (GTA_FILE, {"attention.form": ...}, "attention.form is missing"),
    (GTA_FILE, {"attention.head_dim": ...}, "attention.head_dim is missing"),
    (GTA_FILE, {"attention.head_dim": 10.0}, "attention.head_dim must be an integer"),
    (GTA_FILE, {"attention.head_dim": True}, "attention.head_dim must be an integer"),
    (GTA_FILE, {"attention.head_dim": 2}, "attention.qk_rope_head_dim must be at most head_dim 2"),
    (GTA_FILE, {"attention.qk_rope_head_dim": 3}, "attention.qk_rope_head_dim 3 must be even"),
    (GTA_FILE, {"attention.num_key_value_heads": 4}, "attention.num_attention_heads 6 is no mult"),
    (GTA_FILE, {"hidden_size": ...}, "hidden_size is missing"),
    (GTA_FILE, {"hidden_size": 0}, "hidden_size must be within"),
    (GTA_FILE, {"num_hidden_layers": 2**30}, "num_hidden_layers must be at most 100000"),
    (GTA_FILE, {"mtp_copies": False}, "mtp_copies (false) is unknown"),
    (GTA_FILE, {"sliding_window": 5}, "sliding_window 5 is not supported"),
    (GTA_FILE, {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
    (GTA_FILE, {"eos_token_ids": 3}, "eos_token_ids must be an array"),
    (GTA_FILE, {"eos_token_ids": [-1]}, "eos_token_ids must be an array of integers"),
    (GTA_FILE, {"rope.factor": 2.0}, "rope.factor (2.0) is no setting of rope_type 'default'"),
    (GTA_FILE, {"rope": ...}, "rope is missing"),
    (GTA_FILE, {"rope.rope_theta": 0}, "rope.rope_theta must be above 0"),
    (lowlat_config(GLA), {"attention.num_latent_groups": 4}, "attention.num_attention_heads 6"),
    (
        lowlat_config(GLA),
        {"attention.num_latent_groups": 2**30},
        "num_latent_groups must be within",
    ),
    (lowlat_config(GLA), {"attention.kv_lora_rank": 27}, "attention.kv_lora_rank 27 is no mult"),
    (lowlat_config(GLA), {"attention.q_lora_rank": 0}, "attention.q_lora_rank must be within"),
    (lowlat_config(TPA), {"attention.head_dim": 13}, "attention.head_dim 13 must be even"),
    (lowlat_config(TPA), {"attention.k_rank": 0}, "attention.k_rank must be within"),
    (lowlat_config(TPA), {"rope": {**config_to_hf(EVERY["gla-2"])["rope"]}}, "rope.mscale_all_dim"),
    (lowlat_config(GQA), {"sliding_window_layers": [0]}, "sliding_window_layers has no effect"),
    (
        lowlat_config(GQA, sliding_window=5),
        {"sliding_window_layers": [2]},
        "sliding_window_layers must be layers below 2",
    ),
    (lowlat_config(GQA, moe=MOE), {"moe.n_experts": 3}, "moe.n_experts (3) is unknown"),
    (lowlat_config(GQA, moe=MOE), {"moe.n_group": 2}, "moe.n_group 2 does not divide"),
    (lowlat_config(GQA, moe=MOE), {"moe.num_experts_per_tok": 8}, "moe.num_experts_per_tok 8"),
    (lowlat_config(GQA, moe=MOE), {"moe.scoring_func": "relu"}, "moe.scoring_func"),
    (
        lowlat_config(GQA, moe=MOE),
        {"moe.topk_method": "greedy", "moe.n_group": 7},
        "moe.topk_method 'greedy' knows no groups",
    ),
    (EVERY["combined mla-plain"], {"attention.q_lora_rank": 3, "attention.q_bias": True}, "q_bias"),
    (DIFFER, {"attention.kv_lora_rank": [3, 5]}, "attention.kv_lora_rank has 2 entries for 4 lay"),
    (DIFFER, {"attention.kv_lora_rank": []}, "attention.kv_lora_rank has 0 entries for 4 layers"),
    (
        DIFFER,
        {"attention.kv_lora_rank": [3, 5, 0, 7]},
        "attention.kv_lora_rank of layer 2 must be within 1..",
    ),
    (
        DIFFER,
        {"attention.kv_lora_rank": [3, None, 5, 7]},
        "attention.kv_lora_rank of layer 1 is missing",
    ),
    (
        DIFFER,
        {"attention.kv_lora_rank": [3, 5, "7", 7]},
        "attention.kv_lora_rank of layer 2 must be an integer",
    ),
    (
        DIFFER,
        {"attention.kv_lora_rank": [3, 5, [7], 7]},
        "attention.kv_lora_rank of layer 2 must be an integer",
    ),
    (
        DIFFER,
        {"attention.qk_rope_head_dim": [6, 10, 3, 34]},
        "attention.qk_rope_head_dim of layer 2 3 must be even",
    ),
    (
        DIFFER,
        {"attention.q_bias": [False, False, False, True]},
        "attention.q_bias of layer 3 belongs to q_proj",
    ),
    (
        DIFFER,
        {"attention.qk_rope_head_dim": [6, 0, 2, 34]},
        "attention.qk_nope_head_dim of layer 1 and qk_rope_head_dim are both 0",
    ),
    (
        DIFFER,
        {"attention.qk_rope_head_dim": [6, -2, 2, 34]},
        "attention.qk_rope_head_dim of layer 1 must be within 0..",
    ),
    (GTA_FILE, {"attention.qk_rope_head_dim": 0}, "attention.qk_rope_head_dim must be within 1.."),
    (
        lowlat_config(GLA),
        {"attention.qk_rope_head_dim": 0},
        "attention.qk_rope_head_dim must be within 1..",
    ),
    (DIFFER, {"attention.form": ["mla", "mla", "gqa", "mla"]}, "attention.form"),
    (
        DIFFER,
        {"attention.num_attention_heads": [5, 5, 5, 5]},
        "attention.num_attention_heads must be an integer, the same for all layers",
    ),
    (DIFFER, {"attention.latent": 3}, "attention.latent (3) is unknown"),
    (DIFFER, {"num_hidden_layers": 5}, "entries for 5 layers"),
    (
        DIFFER,
        {"rope.short_factor": [[1.0, 2.0], [1.0] * 5, None, None]},
        "rope.short_factor of layer 0 must have 3 entries, not 2",
    ),
    (
        DIFFER,
        {"rope.short_factor": [[1.0, 0.25, 7.5], [1.0, 0.0, 5.0, 10.0, 17.0], None, None]},
        "rope.short_factor of layer 1 must be numbers above 0",
    ),
    (
        DIFFER,
        {"rope.short_factor": [[1.0] * 3]},
        "rope.short_factor has 1 entries for 4 layers",
    ),
    (
        DIFFER,
        {"rope.short_factor": [[1.0, 0.25, 7.5], 2.0, None, None]},
        "rope.short_factor of layer 1 must be an array",
    ),
    (
        DIFFER,
        {"rope": {"rope_theta": 9.0} | FACTORS_OF_ALL},
        "rope.short_factor of layer 1 must have 5 entries, not 3",
    ),
    (DIFFER, {"rope.rope_theta": [1.0, 2.0]}, "rope.rope_theta has 2 entries for 4 layers"),
    (DIFFER, {"rope.spiral": 1.0}, "rope.spiral (1.0) is unknown"),
    (
        DIFFER,
        {"rope.factor": [1.0, 1.0, 2.0, 4.0]},
        "rope.factor of layer 2 (2.0) is no setting of rope_type 'default'",
    ),
    (
        GTA_FILE,
        {"attention.head_dim": [10, 10]},
        "attention.head_dim is an array, but only layers of form 'mla' differ, not 'gta'",
    ),
    (GTA_FILE, {"rope.rope_theta": [1.0, 2.0]}, "rope.rope_theta is an array, but only layers"),
    (CONFIGS["fp8"], {"quantization.scale_fmt": "e8"}, "quantization.scale_fmt"),
    (CONFIGS["fp8"], {"quantization.weight_block_size": [8]}, "weight_block_size must be two"),
    (CONFIGS["fp8"], {"quantization.weight_block_size": [8, 0]}, "quantization.weight_block_size"),
]


@pytest.mark.parametrize(("config", "changes", "message"), REFUSALS, ids=[r[2] for r in REFUSALS])
def test_refused(config: ModelConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_hf(raw_of(config, changes), source="here/config.json")
    assert str(error.value).startswith("here/config.json: ")
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3"])
def test_families_of_hugging_face_refuse_these_forms(family: str) -> None:
    config = replace(EVERY["gla-2"], model_type=family)
    with pytest.raises(UserError, match=r"cannot express GLA-2, .*model_type 'lowlat' can"):
        config_to_hf(config)


def test_families_of_hugging_face_refuse_a_gate() -> None:
    config = replace(EVERY["gated"], model_type="deepseek_v3")
    with pytest.raises(UserError, match=r"cannot express attn_output_gate.*'lowlat' can"):
        config_to_hf(config)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "kimi_k2"])
def test_families_of_hugging_face_refuse_layers_that_differ(family: str, name: str) -> None:
    """Regression: the numbers of one layer in a file that has them for all layers."""
    config = replace(LAYERS[name], model_type=family)
    with pytest.raises(UserError, match=r"cannot express layers that differ \(MLA .*'lowlat' can"):
        config_to_hf(config)


def test_hostile_layers_are_refused_at_once() -> None:
    """Many layers times many unknown fields would be more memory than there is."""
    count = 100_000
    raw = config_to_hf(lowlat_config(MLA)) | {"num_hidden_layers": count}
    raw["attention"] |= {"kv_lora_rank": [3] * (count - 1) + [5]}
    raw["attention"] |= {f"x{i}": 0 for i in range(10_000)}
    with pytest.raises(UserError, match=r"attention.x0 \(0\) is unknown"):
        config_from_hf(raw)


def test_rope_of_the_decoupled_key_scales_the_softmax() -> None:
    """m(mscale_all_dim)^2 belongs to GLA and GTA as to MLA: their scores are only partly rotary."""
    for name in ("gla-2", "gta-yarn"):
        config = EVERY[name]
        plain = replace(config, rope=RopeConfig(rope_theta=1000.0)).softmax_scale_of(0)
        assert config.rope == YARN
        assert config.softmax_scale_of(0) / plain == pytest.approx((0.11 * math.log(4) + 1) ** 2)
