"""ModelConfig -> GGUF metadata, with the keys of llama.cpp's converter.

A setting that llama.cpp's architectures cannot express is an error that names it. `metadata_reader`
is the other direction.
"""

import logging
from typing import Any

import torch

from lowlat.checkpoint.gguf.metadata_mla import MINICPM3, MINICPM3_SCALES, MISTRAL4
from lowlat.checkpoint.gguf.tensor_layout import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from lowlat.config.attention import short_name, uniform
from lowlat.config.hf.families import LOWLAT
from lowlat.config.model import (
    AttentionConfig,
    GQAConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)
from lowlat.ops.rope import inverse_frequencies
from lowlat.utils.errors import UserError

_log = logging.getLogger(__name__)

GATES = {"softmax": 1, "sigmoid": 2}
LLAMA_BETA_FAST = 32.0
"""llama.cpp uses this beta_fast for YaRN in deepseek2 and ignores the file's."""


def architecture_of(config: ModelConfig) -> str:
    """llama.cpp's name of the model's architecture. Raises UserError if it has none."""
    attention, rope = attention_of(config), rope_of(config)
    if config.model_type == MINICPM3:
        return _require_minicpm3(config, rope)
    scales = (config.scale_emb, config.residual_scale, config.output_scale)
    _require(scales == (1.0, 1.0, 1.0), "scale_emb, scale_depth and dim_model_base")
    is_scaled = bool(rope.llama_4_scaling_beta)
    _require(not is_scaled or config.model_type == MISTRAL4, "queries scaled by their position")
    _require(rope.long_pair_factors is None, "longrope with short and long factors")
    if isinstance(attention, MLAConfig):
        without = "a latent without norm (models converted to MLA; deepseek2 always has one)"
        _require(attention.kv_a_layernorm, without)
        biases = attention.attention_bias or attention.q_bias or attention.o_bias
        _require(not biases, "latent attention with biases")
        _require(not attention.attn_output_gate, "attn_output_gate")
        _require(rope.rope_interleave, "rope_interleave false")
        _require(attention.qk_nope_head_dim > 0, "qk_nope_head_dim 0")
        if attention.indexer is not None:
            return _sparse_architecture(config, rope)
        return MISTRAL4 if config.model_type == MISTRAL4 else "deepseek2"
    if not isinstance(attention, GQAConfig):
        raise _unsupported(f"attention of form {short_name(attention)}")
    family = "llama" if config.model_type == "mistral" else config.model_type
    _require(config.model_type != LOWLAT, "model_type 'lowlat' without latent attention")
    if family != "llama":
        _require(config.sliding_window is None, f"sliding_window {config.sliding_window}")
        # qwen2 has biases on q, k and v; llama.cpp stores other biases in llama only
        biases = attention.o_bias or (attention.qkv_bias and family != "qwen2")
        _require(not biases, f"attention_bias true of model_type '{family}'")
    return family


def _sparse_architecture(config: ModelConfig, rope: RopeConfig) -> str:
    """That of V3.2 or of GLM-5, by what each computes: the indexer's RoPE layout and sharing."""
    attention = attention_of(config)
    assert isinstance(attention, MLAConfig) and attention.indexer is not None
    _require(attention.q_lora_rank is not None, "an indexer without query latent")
    _require(config.moe is not None, "sparse attention without experts")
    width = attention.indexer.index_head_dim
    _require(width & (width - 1) == 0, f"index_head_dim {width}, no power of two,")
    if attention.indexer.rope_interleave:
        _require(rope.rope_type == "default", f"rope_type '{rope.rope_type}' of glm-dsa")
        return "glm-dsa"
    _require(not isinstance(config.attention, tuple), "shared choices with half-split indexers")
    # llama.cpp computes other logits
    fits = rope.rope_type != "yarn" or rope.mscale == 1.0
    _require(fits, f"YaRN's mscale {rope.mscale} of deepseek32")
    return "deepseek32"


def _require_minicpm3(config: ModelConfig, rope: RopeConfig) -> str:
    """The architecture. Raises UserError for settings that llama.cpp's minicpm3 has otherwise."""
    attention = attention_of(config)
    assert isinstance(attention, MLAConfig)
    found = {name: getattr(config, name) for name in MINICPM3_SCALES}
    wanted = ", ".join(f"{name} {value:g}" for name, value in MINICPM3_SCALES.items())
    _require(found == MINICPM3_SCALES, f"minicpm3 with other factors than {wanted}")
    _require(attention.q_lora_rank is not None, "minicpm3 without q_lora_rank")
    _require(not attention.attention_bias, "latent attention with biases")
    plain = rope.rope_type in ("default", "longrope") and not rope.mscale_all_dim
    _require(plain, f"rope_type '{rope.rope_type}' of minicpm3, or with mscale_all_dim")
    return MINICPM3


def attention_of(config: ModelConfig) -> AttentionConfig:
    """The attention of every layer. Raises UserError where layers differ."""
    attention = uniform(config.attention)
    if attention is None:
        raise _unsupported("layers that differ in their attention")
    return attention


def rope_of(config: ModelConfig) -> RopeConfig:
    """The rotary settings of every layer. Raises UserError where layers differ."""
    if isinstance(config.rope, RopeConfig):
        return config.rope
    raise _unsupported("layers that differ in their attention")


def gguf_keys(config: ModelConfig, arch: str) -> dict[str, Any]:
    """All keys but the vocabulary's. Raises UserError naming a setting that has no key."""
    attention = attention_of(config)
    assert isinstance(attention, MLAConfig | GQAConfig)
    keys: dict[str, Any] = {
        "block_count": config.num_cache_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "vocab_size": config.vocab_size,
        "attention.head_count": attention.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope_of(config).rope_theta),
    }
    if arch == MINICPM3:
        assert isinstance(attention, MLAConfig)
        return _prefixed(arch, keys | _minicpm3_keys(attention) | _factors_keys(rope_of(config)))
    if isinstance(attention, MLAConfig):
        keys |= _latent_keys(attention) | _expert_keys(config) | _indexer_keys(config, arch)
        if config.num_nextn_predict_layers:
            keys["nextn_predict_layers"] = config.num_nextn_predict_layers
    else:
        keys |= _grouped_keys(config, attention)
    if rope_of(config).llama_4_scaling_beta:
        keys["attention.temperature_scale"] = rope_of(config).llama_4_scaling_beta
        keys["attention.temperature_length"] = rope_of(config).original_max_position_embeddings
    return _prefixed(arch, keys | _rope_keys(config))


def _prefixed(arch: str, keys: dict[str, Any]) -> dict[str, Any]:
    return {f"{arch}.{key}": value for key, value in keys.items()}


def rope_divisors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Tensors with one divisor per frequency, by name; none for most models."""
    rope = rope_of(config)
    if rope.rope_type == "longrope" and rope.pair_factors is not None:
        short = torch.tensor(rope.pair_factors)
        if config.model_type != MINICPM3:
            return {ROPE_FACTORS: short}
        long = torch.tensor(rope.long_pair_factors or rope.pair_factors)
        return {SHORT_FACTORS: short, LONG_FACTORS: long}
    if rope.rope_type != "llama3":
        return {}
    plain = RopeConfig(rope_theta=rope.rope_theta)
    assert isinstance(config.attention, GQAConfig)
    dim = config.attention.head_dim
    return {ROPE_FACTORS: inverse_frequencies(plain, dim) / inverse_frequencies(rope, dim)}


def _latent_keys(attention: MLAConfig) -> dict[str, Any]:
    """Keys of absorbed MLA: one key and value head, the latent."""
    latent, rope_dim = attention.kv_lora_rank, attention.qk_rope_head_dim
    return {
        "attention.head_count_kv": 1,
        # llama.cpp demands the key even without a query latent
        "attention.q_lora_rank": attention.q_lora_rank or 0,
        "attention.kv_lora_rank": latent,
        "attention.key_length": latent + rope_dim,
        "attention.value_length": latent,
        "attention.key_length_mla": attention.qk_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "rope.dimension_count": rope_dim,
    }


def _indexer_keys(config: ModelConfig, arch: str) -> dict[str, Any]:
    layers = [config.attention_of(layer) for layer in range(config.num_hidden_layers)]
    indexers = [layer.indexer for layer in layers if isinstance(layer, MLAConfig) and layer.indexer]
    if not indexers:
        return {}
    keys: dict[str, Any] = {
        "attention.indexer.head_count": indexers[0].index_n_heads,
        "attention.indexer.key_length": indexers[0].index_head_dim,
        "attention.indexer.top_k": indexers[0].index_topk,
    }
    if arch == "glm-dsa":
        keys["attention.indexer.types"] = [int(not indexer.is_shared) for indexer in indexers]
    return keys


def _minicpm3_keys(attention: MLAConfig) -> dict[str, Any]:
    return {
        "attention.head_count_kv": attention.num_attention_heads,
        "attention.q_lora_rank": attention.q_lora_rank,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.qk_head_dim,
        "attention.value_length": attention.v_head_dim,
        "rope.dimension_count": attention.qk_rope_head_dim,
    }


def _factors_keys(rope: RopeConfig) -> dict[str, Any]:
    """Keys of longrope with two sets of factors, which are tensors."""
    if rope.rope_type != "longrope":
        return {}
    keys: dict[str, Any] = {
        "rope.scaling.original_context_length": rope.original_max_position_embeddings
    }
    if rope.attention_factor not in (None, 1.0):
        keys["rope.scaling.attn_factor"] = rope.attention_factor
    return keys


def _grouped_keys(config: ModelConfig, attention: GQAConfig) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "attention.head_count_kv": attention.num_key_value_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "rope.dimension_count": attention.head_dim,
    }
    window = config.sliding_window
    if window is not None:
        keys["attention.sliding_window"] = window
        if window < config.max_position_embeddings:
            _log.warning(
                "llama.cpp reads no sliding_window of mistral, so its tokens will differ in texts "
                "longer than the %d tokens of this one",
                window,
            )
    return keys


def _expert_keys(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        has_softmax = config.model_type in ("deepseek_v2", MISTRAL4)
        return {
            "leading_dense_block_count": config.num_cache_layers,
            "expert_feed_forward_length": config.intermediate_size,
            "expert_shared_count": 0,
            "expert_gating_func": GATES["softmax" if has_softmax else "sigmoid"],
        }
    _require(moe.moe_layer_freq == 1, f"moe_layer_freq {moe.moe_layer_freq}")
    _require(not moe.output_norm, "a norm on the output of experts")
    has_bias = moe.topk_method != "noaux_tc" or moe.router_bias or config.model_type == MISTRAL4
    _require(has_bias, f"experts of model_type '{config.model_type}' without selection biases")
    _require(moe.mlp_layer_types is None, "dense layers after sparse ones (mlp_layer_types)")
    _require(moe.n_shared_experts > 0, "experts without shared ones")
    if moe.topk_method == "group_limited_greedy":
        _log.warning("llama.cpp weighs groups of experts as V3 does, so its tokens will differ")
    normalizes, scale = _weighting(moe)
    # If topk_group equals n_group, group limiting has no effect: write one group.
    is_grouped = moe.topk_group < moe.n_group
    return {
        "leading_dense_block_count": moe.first_k_dense_replace,
        "expert_feed_forward_length": moe.moe_intermediate_size,
        "expert_count": moe.n_routed_experts,
        "expert_used_count": moe.num_experts_per_tok,
        "expert_shared_count": moe.n_shared_experts,
        "expert_group_count": moe.n_group if is_grouped else 1,
        "expert_group_used_count": moe.topk_group if is_grouped else 1,
        "expert_gating_func": GATES[moe.scoring_func],
        "expert_weights_scale": scale,
        "expert_weights_norm": normalizes,
    }


def _weighting(moe: MoEConfig) -> tuple[bool, float]:
    """Whether top-k scores are normalized, and the scaling factor (llama.cpp always applies it)."""
    if moe.scale_after_norm or not moe.norm_topk_prob:
        return moe.norm_topk_prob, float(moe.routed_scaling_factor)
    if moe.num_experts_per_tok == 1:  # V2 does not normalize it
        return False, float(moe.routed_scaling_factor)
    return True, 1.0


def _rope_keys(config: ModelConfig) -> dict[str, Any]:
    rope = rope_of(config)
    kind = rope.rope_type
    is_latent = isinstance(attention_of(config), MLAConfig)
    scaling: dict[str, Any] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope.factor)}
    match kind:
        case "default":
            return {}
        case "linear":
            # llama.cpp computes other logits
            _require(not is_latent, "rope_type 'linear' of MLA")
            _require(not rope.mscale_all_dim, "rope_type 'linear' with mscale_all_dim")
            return scaling
        case "yarn":
            return scaling | _yarn_keys(rope, is_latent)
        case "llama3" | "longrope":
            factor = 1.0 if rope.attention_factor is None else rope.attention_factor
            plain = factor == 1.0 and not rope.mscale_all_dim and not is_latent
            _require(plain, f"rope_type '{kind}' with a factor on attention, or of MLA,")
            return {}


def _yarn_keys(rope: RopeConfig, is_latent: bool) -> dict[str, Any]:
    _require(rope.truncate, "YaRN with truncate false")
    _require(rope.attention_factor is None, "YaRN with an explicit attention_factor")
    keys = {
        "rope.scaling.original_context_length": rope.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(rope.beta_fast),
        "rope.scaling.yarn_beta_slow": float(rope.beta_slow),
    }
    if not is_latent:
        _require(not (rope.mscale or rope.mscale_all_dim), "YaRN's mscale outside MLA")
        return keys
    if rope.beta_fast != LLAMA_BETA_FAST:
        _log.warning(
            "llama.cpp takes YaRN's beta_fast as %g in MLA, not %g, so its tokens will differ",
            LLAMA_BETA_FAST,
            rope.beta_fast,
        )
    same = rope.mscale == rope.mscale_all_dim and bool(rope.mscale)
    _require(same, f"YaRN's mscale {rope.mscale} with mscale_all_dim {rope.mscale_all_dim}")
    return keys | {"rope.scaling.yarn_log_multiplier": 0.1 * (rope.mscale_all_dim or 0.0)}


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _unsupported(what)


def _unsupported(what: str) -> UserError:
    return UserError(f"--format gguf: llama.cpp's files cannot express {what}; use --format hf")
