"""Small configs: parts of a model to vary with `dataclasses.replace`, and whole models by family.

Prime sizes where the part allows them, so that no two dimensions agree by chance.
"""

from typing import Any

from lowlat.config.model import (
    GQAConfig,
    MLAConfig,
    ModelAttention,
    ModelConfig,
    MoEConfig,
    RopeConfig,
)

MLA = MLAConfig(
    num_attention_heads=3,
    kv_lora_rank=13,
    q_lora_rank=11,
    qk_nope_head_dim=5,
    qk_rope_head_dim=6,
    v_head_dim=7,
)
V3_MLA = MLAConfig(
    num_attention_heads=128,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
"""The attention of DeepSeek-V3 as released."""
GQA = GQAConfig(num_attention_heads=6, num_key_value_heads=2, head_dim=10)

MOE = MoEConfig(
    n_routed_experts=12,
    num_experts_per_tok=3,
    n_shared_experts=2,
    moe_intermediate_size=5,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
)
"""DeepSeek-V3's rule, without groups, behind one dense layer."""
PLAIN_MOE = MoEConfig(
    n_routed_experts=5,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=11,
    first_k_dense_replace=1,
)
"""DeepSeek-V3's rule without a scaling factor."""

ROPE = RopeConfig(rope_theta=10000.0)
INTERLEAVED = RopeConfig(rope_theta=10000.0, rope_interleave=True)
YARN = RopeConfig(
    rope_theta=10000.0,
    rope_type="yarn",
    rope_interleave=True,
    factor=4.0,
    original_max_position_embeddings=128,
    mscale=0.7,
    mscale_all_dim=0.7,
)
LLAMA3 = RopeConfig(
    rope_theta=10000.0,
    rope_type="llama3",
    factor=8.0,
    original_max_position_embeddings=64,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
)


def model_config(family: str, attention: ModelAttention, **changes: Any) -> ModelConfig:
    """A model of two layers; `changes` set or replace fields."""
    fields: dict[str, Any] = {
        "model_type": family,
        "hidden_size": 23,
        "intermediate_size": 19,
        "num_hidden_layers": 2,
        "vocab_size": 41,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "attention": attention,
        "rope": ROPE,
    }
    return ModelConfig(**(fields | changes))


def byte_model_config(family: str, attention: ModelAttention, **changes: Any) -> ModelConfig:
    """The same with the vocabulary of `fakes.byte_tokenizer`, and weights that are not small."""
    fields: dict[str, Any] = {
        "intermediate_size": 31,
        "vocab_size": 263,
        "max_position_embeddings": 97,
        "rope": RopeConfig(rope_theta=100.0),
        "initializer_range": 0.4,
    }
    return model_config(family, attention, **(fields | changes))
