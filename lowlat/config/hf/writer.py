"""ModelConfig -> config.json; `reader` is the other direction."""

from dataclasses import asdict
from typing import Any

from lowlat.config.attention import short_name, uniform
from lowlat.config.hf.families import (
    ARCHITECTURES,
    DENSE_MLA_FAMILIES,
    LOWLAT,
    MLA_FAMILIES,
    MTP_FAMILIES,
    ROPE_LAYOUT_FAMILIES,
    SPARSE_FAMILIES,
)
from lowlat.config.hf.indexer import indexer_to_hf
from lowlat.config.hf.lowlat_model_type import config_to_lowlat
from lowlat.config.hf.moe import (
    FAMILY_FIELDS,
    LAYER_TYPE_FAMILIES,
    SOFTMAX_FAMILIES,
    regular_layer_types,
)
from lowlat.config.hf.padded_latent import extension_to_hf
from lowlat.config.hf.quantization import storage_to_hf
from lowlat.config.hf.rope import rope_to_hf
from lowlat.config.model import (
    AttentionConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
)
from lowlat.utils.errors import UserError

SCALES = ("scale_emb", "scale_depth", "dim_model_base")
"""Fields of minicpm3 alone."""


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The contents of config.json for `config`, without a dtype; `config_from_hf` reads it back.

    mtp_copies is not written: the tensors imply it. Raises UserError if the family has no field for
    a setting.
    """
    if config.model_type == LOWLAT:
        return config_to_lowlat(config)
    attention, eos = _uniform_attention(config), list(config.eos_token_ids)
    if config.model_type != "minicpm3":
        scales = (config.scale_emb, config.scale_depth, config.dim_model_base)
        _require(config, scales == (1.0, None, None), "scale_emb, scale_depth or dim_model_base")
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": attention.num_attention_heads,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "attention_dropout": 0.0,
        "use_cache": True,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
    }
    raw |= _rope_to_hf(config)
    match attention:
        case MLAConfig():
            raw |= _mla_to_hf(config, attention)
            if config.model_type in DENSE_MLA_FAMILIES:
                _require(config, config.moe is None, "experts")
            else:
                raw |= _moe_to_hf(config)
        case GQAConfig():
            raw |= _gqa_to_hf(config, attention) | _windows_to_hf(config)
        case _:
            _require(config, False, short_name(attention))
    return raw | storage_to_hf(config)


def _rope_to_hf(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope_of(0)
    raw = rope_to_hf(rope)
    if config.model_type == "mistral4":
        # transformers takes absent rope_parameters of this family for those of one checkpoint
        scaling = raw["rope_scaling"] or {"rope_type": "default"}
        return {"rope_parameters": {"rope_theta": rope.rope_theta, **scaling}}
    _require(config, not rope.llama_4_scaling_beta, "llama_4_scaling_beta")
    return raw


def _uniform_attention(config: ModelConfig) -> AttentionConfig:
    """The attention of every layer. Raises UserError if layers differ, but for shared choices."""
    attention = uniform(config.attention)
    if attention is None or isinstance(config.rope, tuple):
        raise _inexpressible(config, f"layers that differ ({short_name(config.attention)})")
    return attention


def _mla_to_hf(config: ModelConfig, attention: MLAConfig) -> dict[str, Any]:
    _require(config, config.model_type in MLA_FAMILIES, "Multi-head Latent Attention")
    _require(config, config.sliding_window is None, "a sliding window")
    _require(config, attention.qk_rope_head_dim > 0, "qk_rope_head_dim 0")
    _require(config, not attention.attn_output_gate, "attn_output_gate")
    raw: dict[str, Any] = {
        "num_key_value_heads": attention.num_attention_heads,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": attention.attention_bias,
    }
    interleave = config.rope_of(0).rope_interleave
    if config.model_type in ROPE_LAYOUT_FAMILIES:
        raw["rope_interleave"] = interleave
    else:
        fits = interleave == (config.model_type != "minicpm3")
        _require(config, fits, f"rope_interleave {str(interleave).lower()}")
    if config.model_type in MTP_FAMILIES:
        raw["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    else:
        _require(config, config.num_nextn_predict_layers == 0, "MTP modules")
    is_sparse = config.model_type in SPARSE_FAMILIES
    _require(config, is_sparse == (attention.indexer is not None), "this sparse attention")
    if is_sparse:
        _require(config, attention.q_lora_rank is not None, "an indexer without query latent")
        own = attention.indexer.index_rope_head_dim if attention.indexer else None
        fits = own in (None, attention.qk_rope_head_dim)
        _require(config, fits, f"index_rope_head_dim {own}")
        raw |= indexer_to_hf(config)
        shares = isinstance(config.attention, tuple)
        _require(config, not shares or "indexer_types" in raw, "layers that share a choice")
    if config.model_type == "minicpm3":
        raw |= {name: getattr(config, name) for name in SCALES}
    if not attention.kv_a_layernorm:
        _require(config, config.model_type == "deepseek_v3", "a latent without norm")
        return raw | extension_to_hf(attention, config.hidden_size)
    _require(config, not (attention.q_bias or attention.o_bias), "biases of single projections")
    return raw


def _moe_to_hf(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe or _no_experts(config)
    raw = asdict(moe)
    is_v2 = config.model_type == "deepseek_v2"
    has_softmax = config.model_type in SOFTMAX_FAMILIES
    has_output_norm = config.model_type == "axk1"
    _require(config, is_v2 != (moe.topk_method == "noaux_tc"), f"topk_method {moe.topk_method}")
    fits = has_softmax == (moe.scoring_func == "softmax")
    _require(config, fits, f"scoring_func {moe.scoring_func}")
    _require(config, is_v2 != moe.scale_after_norm, f"scale_after_norm {moe.scale_after_norm}")
    _require(config, has_output_norm == moe.output_norm, f"output_norm {moe.output_norm}")
    if config.model_type != "axk1":  # in which the tensors imply it
        has_bias = config.model_type != "mistral4"
        _require(config, has_bias == moe.router_bias, f"router_bias {moe.router_bias}")
    for name in FAMILY_FIELDS:
        del raw[name]
    types = raw.pop("mlp_layer_types")
    if types is not None:
        del raw["first_k_dense_replace"], raw["moe_layer_freq"]
    if types is not None or config.model_type in LAYER_TYPE_FAMILIES:
        layers = range(config.num_hidden_layers)
        first, frequency = moe.first_k_dense_replace, moe.moe_layer_freq
        raw["mlp_layer_types"] = list(types or regular_layer_types(layers, first, frequency))
    return raw


def _no_experts(config: ModelConfig) -> MoEConfig:
    """To standard readers a dense model has no layer after first_k_dense_replace."""
    is_v2 = config.model_type == "deepseek_v2"
    return MoEConfig(
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_shared_experts=1,
        moe_intermediate_size=config.intermediate_size,
        first_k_dense_replace=config.num_cache_layers,
        scoring_func="softmax" if config.model_type in SOFTMAX_FAMILIES else "sigmoid",
        topk_method="greedy" if is_v2 else "noaux_tc",
        scale_after_norm=not is_v2,
        router_bias=config.model_type != "mistral4",
        output_norm=config.model_type == "axk1",
    )


def _gqa_to_hf(config: ModelConfig, attention: GQAConfig) -> dict[str, Any]:
    _require(config, config.model_type not in MLA_FAMILIES, "grouped-query attention")
    _require(config, config.moe is None, "experts")
    _require(config, config.num_nextn_predict_layers == 0, "MTP modules")
    _require(config, not config.rope_of(0).rope_interleave, "rope_interleave true")
    _require(
        config, attention.qk_norm == (config.model_type == "qwen3"), f"qk_norm {attention.qk_norm}"
    )
    raw = {
        "num_key_value_heads": attention.num_key_value_heads,
        "head_dim": attention.head_dim,
    }
    bias = attention.qkv_bias
    expected = {"qwen2": (True, False), "mistral": (False, False)}
    biases = (bias, attention.o_bias)
    fits = biases == expected.get(config.model_type, (bias, bias))
    _require(config, fits, f"(qkv_bias, o_bias) {biases}")
    return raw if config.model_type in expected else raw | {"attention_bias": bias}


def _windows_to_hf(config: ModelConfig) -> dict[str, Any]:
    window, layers = config.sliding_window, config.sliding_window_layers
    if config.model_type == "llama":
        _require(config, window is None, "a sliding window")
        return {}
    if config.model_type == "mistral":
        _require(config, layers is None, "a sliding window on some layers only")
        return {"sliding_window": window}
    if window is None:
        return {"use_sliding_window": False, "sliding_window": None}
    count = config.num_hidden_layers
    sliding = set(range(count) if layers is None else layers)
    types = ["sliding_attention" if i in sliding else "full_attention" for i in range(count)]
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "max_window_layers": min(sliding),
        "layer_types": types,
    }


def _require(config: ModelConfig, condition: bool, what: str) -> None:
    if not condition:
        raise _inexpressible(config, what)


def _inexpressible(config: ModelConfig, what: str) -> UserError:
    return UserError(
        f"a config.json of model_type '{config.model_type}' cannot express {what}; "
        f"model_type '{LOWLAT}' can"
    )
