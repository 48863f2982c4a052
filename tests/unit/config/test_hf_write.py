"""Writing config.json: read back to the same model, loaded by transformers with its meaning."""

import json
from dataclasses import replace
from typing import Any

import pytest

from lowlat.config.hf.reader import config_from_hf
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, QuantConfig
from lowlat.config.presets import load_preset, preset_names
from lowlat.utils.errors import UserError

from .files import FAMILIES, GLM, LLAMA, MISTRAL, QWEN2, QWEN3, V2, V3, without

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 53, "mscale": 0.7}
FACTORS = {"short_factor": [1.0, 2.0, 3.0], "long_factor": [1.0, 2.0, 3.0]}
WINDOWS = {"use_sliding_window": True, "sliding_window": 9}
VARIANTS: dict[str, dict[str, Any]] = {
    "v3 yarn": V3 | {"rope_scaling": YARN | {"mscale_all_dim": 0.5, "beta_fast": 16}},
    "v3 untruncated": V3 | {"rope_scaling": YARN | {"truncate": False}},
    "v3 attention factor": V3 | {"rope_scaling": YARN | {"attention_factor": 1.5}},
    "v3 longrope": V3 | {"rope_scaling": {"rope_type": "longrope", **FACTORS}},
    "v3 two longropes": V3
    | {
        "original_max_position_embeddings": 53,
        "rope_scaling": {"rope_type": "longrope", **FACTORS, "long_factor": [2.0, 3.0, 5.0]},
    },
    "v3 linear": V3 | {"rope_scaling": {"type": "linear", "factor": 3.0, "mscale_all_dim": 1.0}},
    "v3 half layout": V3 | {"rope_interleave": False, "attention_bias": True},
    "v3 mtp": V3 | {"num_nextn_predict_layers": 2, "tie_word_embeddings": True},
    "v3 dense": V3 | {"first_k_dense_replace": 5},
    "v3 dense with mtp": V3 | {"first_k_dense_replace": 6, "num_nextn_predict_layers": 1},
    "v3 no query latent": V3 | {"q_lora_rank": None, "n_shared_experts": 0},
    "v3 sparse layers": V3 | {"moe_layer_freq": 2, "norm_topk_prob": False},
    "v2 greedy": V2 | {"topk_method": "greedy"},
    "v2 one expert": V2 | {"norm_topk_prob": True, "num_experts_per_tok": 1},
    "v2 dense": V2 | {"n_routed_experts": None},
    "glm layers": GLM | {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 2},
    "glm any order": GLM | {"mlp_layer_types": ["sparse", "dense"] * 2 + ["dense"]},
    "glm frequency": GLM | {"first_k_dense_replace": 1, "moe_layer_freq": 2},
    "glm dense": GLM | {"mlp_layer_types": ["dense"] * 5},
    "llama biased": LLAMA | {"attention_bias": True, "head_dim": 8, "eos_token_id": [1, 2]},
    "llama mqa": LLAMA | {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0},
    "mistral no window": MISTRAL | {"sliding_window": None},
    "qwen2 windows": QWEN2 | WINDOWS | {"max_window_layers": 3},
    "qwen2 all windows": QWEN2 | WINDOWS | {"max_window_layers": 0},
    "qwen3 some windows": QWEN3
    | WINDOWS
    | {"layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"]},
}
VARIANTS |= FAMILIES


@pytest.mark.parametrize("name", VARIANTS)
def test_written_and_read_back(name: str):
    config = config_from_hf(VARIANTS[name])
    written = json.loads(json.dumps(config_to_hf(config), allow_nan=False))
    assert config_from_hf(written) == config


def test_layer_types_of_v3_are_written_and_read_back():
    """transformers' class of deepseek_v3 does not read them."""
    types = {"mlp_layer_types": ["sparse", "dense"] * 2 + ["dense"]}
    config = config_from_hf(without(V3, "first_k_dense_replace") | types)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_written_and_read_back(name: str):
    assert config_from_hf(config_to_hf(load_preset(name))) == load_preset(name)


def through_transformers(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    """transformers' config object for the written file, and the file it saves in turn."""
    transformers = pytest.importorskip("transformers")
    raw = json.loads(json.dumps(config_to_hf(config)))
    # kimi_k2 is deepseek_v3 to every reader, but transformers has no class of that name
    family = "deepseek_v3" if config.model_type == "kimi_k2" else config.model_type
    loaded = transformers.CONFIG_MAPPING[family].from_dict(raw)
    saved = json.loads(loaded.to_json_string(use_diff=False))
    return loaded, saved | {"model_type": config.model_type}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_and_saves_it_unchanged(name: str):
    """The file transformers saves uses the new rope_parameters spelling and adds its own fields."""
    config = config_from_hf(VARIANTS[name])
    _, saved = through_transformers(config)
    assert config_from_hf(saved) == config


@pytest.mark.parametrize("name", preset_names())
def test_transformers_loads_presets(name: str):
    config = load_preset(name)
    loaded, saved = through_transformers(config)
    assert config_from_hf(saved) == config
    attention = config.attention_of(0)
    if isinstance(attention, MLAConfig):
        assert loaded.kv_lora_rank == attention.kv_lora_rank
        assert loaded.q_lora_rank == attention.q_lora_rank
        assert loaded.qk_head_dim == attention.qk_head_dim
    else:
        assert loaded.num_key_value_heads == attention.num_key_value_heads
        assert loaded.head_dim == attention.head_dim
    assert loaded.rope_parameters["rope_theta"] == config.rope.rope_theta
    assert loaded.rope_parameters["rope_type"] == config.rope.rope_type
    assert loaded.tie_word_embeddings == config.tie_word_embeddings


def test_no_mtp_is_written_as_none():
    """transformers' deepseek_v3 defaults to one MTP layer where the field is absent."""
    assert config_to_hf(config_from_hf(V3))["num_nextn_predict_layers"] == 0


def test_what_a_family_cannot_express_is_refused():
    llama, qwen2 = config_from_hf(LLAMA), config_from_hf(QWEN2)
    v2, v3 = config_from_hf(V2), config_from_hf(V3)
    assert isinstance(llama.attention, GQAConfig)
    cases = [
        replace(llama, attention=replace(llama.attention, qkv_bias=True)),
        replace(llama, attention=replace(llama.attention, qk_norm=True)),
        replace(llama, attention=v3.attention),
        replace(llama, sliding_window=5),
        replace(llama, num_nextn_predict_layers=1),
        replace(llama, moe=v3.moe),
        replace(llama, rope=v3.rope),
        replace(qwen2, attention=llama.attention),
        replace(config_from_hf(MISTRAL), sliding_window_layers=(1,)),
        replace(v3, moe=v2.moe),
        replace(v3, sliding_window=5),
        replace(v3, attention=llama.attention),
        replace(v2, num_nextn_predict_layers=1),
        replace(v2, rope=llama.rope),
    ]
    for config in cases:
        with pytest.raises(UserError, match=f"'{config.model_type}' cannot express"):
            config_to_hf(config)


def test_quantisation_is_written():
    quant = QuantConfig(scale_fmt="ue8m0", modules_to_not_convert=("lm_head",))
    config = replace(config_from_hf(V3), quantization=quant)
    assert config_to_hf(config)["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
        "modules_to_not_convert": ["lm_head"],
    }
    assert config_from_hf(config_to_hf(config)) == config
