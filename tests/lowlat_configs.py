"""Small models of model_type "lowlat": every form of attention, and combinations that no family of
Hugging Face can say. Prime sizes where the form allows them.
"""

from dataclasses import replace
from typing import Any

import torch

from lowlat.config.model import (
    GLAConfig,
    GTAConfig,
    ModelAttention,
    ModelConfig,
    RopeConfig,
    TPAConfig,
)
from lowlat.model.transformer import Transformer
from tests import configs

GLA = GLAConfig(
    num_attention_heads=6,
    num_latent_groups=2,
    kv_lora_rank=26,
    q_lora_rank=11,
    qk_nope_head_dim=5,
    qk_rope_head_dim=6,
    v_head_dim=7,
)
GTA = GTAConfig(num_attention_heads=6, num_key_value_heads=3, head_dim=10, qk_rope_head_dim=4)
TPA = TPAConfig(num_attention_heads=5, head_dim=14, q_rank=3, k_rank=2, v_rank=1)
GQA = replace(configs.GQA, num_key_value_heads=3)
MLA = replace(
    configs.MLA, num_attention_heads=5, q_lora_rank=None, qk_nope_head_dim=7, v_head_dim=3
)
MOE = replace(configs.MOE, n_routed_experts=7, n_shared_experts=1)
YARN = replace(
    configs.YARN, rope_theta=1000.0, original_max_position_embeddings=29, mscale_all_dim=1.1
)


def lowlat_config(attention: ModelAttention, **changes: Any) -> ModelConfig:
    """A dense model of two layers; `changes` replace fields."""
    fields = {"bos_token_id": 0, "eos_token_ids": (257, 261)}
    return configs.byte_model_config("lowlat", attention, **(fields | changes))


FORMS: dict[str, ModelConfig] = {
    "gla-2": lowlat_config(GLA, rope=YARN),
    "gla-3": lowlat_config(replace(GLA, num_latent_groups=3, kv_lora_rank=33, q_lora_rank=None)),
    "mlra": lowlat_config(replace(GLA, sum_groups=True), rope=YARN),
    "gated": lowlat_config(replace(MLA, attn_output_gate=True)),
    "gta-3": lowlat_config(GTA),
    "gta-yarn": lowlat_config(replace(GTA, num_key_value_heads=1), rope=YARN),
    "tpa": lowlat_config(TPA),
    "tpa-kv": lowlat_config(replace(TPA, q_rank=None, k_rank=1, v_rank=3)),
}
"""Forms of attention beyond MLA and GQA."""

COMBINED: dict[str, ModelConfig] = {
    "mha": lowlat_config(
        replace(GQA, num_key_value_heads=6, qk_norm=True), moe=MOE, num_nextn_predict_layers=1
    ),
    "gqa": lowlat_config(GQA, moe=MOE, num_nextn_predict_layers=2),
    "mqa": lowlat_config(
        replace(GQA, num_key_value_heads=1, qkv_bias=True),
        moe=replace(MOE, n_shared_experts=0, scoring_func="softmax", topk_method="greedy"),
        sliding_window=5,
        sliding_window_layers=(1,),
    ),
    "mla": lowlat_config(MLA, tie_word_embeddings=True, num_nextn_predict_layers=1),
    "mla-plain": lowlat_config(replace(MLA, kv_a_layernorm=False, o_bias=True)),
    "gla": lowlat_config(GLA, moe=MOE, num_nextn_predict_layers=1),
    "gta": lowlat_config(GTA, moe=MOE, num_nextn_predict_layers=1),
    "tpa": lowlat_config(TPA, moe=MOE, num_nextn_predict_layers=1),
}
"""Attention of every form with experts, MTP modules and what else only this family can say."""

DIFFERING = (
    replace(MLA, kv_lora_rank=11, kv_a_layernorm=False),
    replace(MLA, kv_lora_rank=101, qk_nope_head_dim=0, qk_rope_head_dim=10),
    replace(MLA, kv_lora_rank=3, qk_rope_head_dim=2, v_head_dim=37, attention_bias=True),
    replace(MLA, kv_lora_rank=67, q_lora_rank=11, qk_nope_head_dim=29, qk_rope_head_dim=34),
)
"""Layers as unlike as they can be: after a wide one a narrow one, whose padding it would fill."""


def chosen_frequencies(*factors: float, interleave: bool = False) -> RopeConfig:
    """One frequency per pair, each divided by its factor."""
    return RopeConfig(
        rope_theta=100.0,
        rope_type="longrope",
        rope_interleave=interleave,
        factor=1.0,
        original_max_position_embeddings=97,
        attention_factor=1.0,
        pair_factors=factors,
    )


LAYER_ROPES = (
    chosen_frequencies(1.0, 0.25, 7.5),
    chosen_frequencies(*(1.0 + i * i for i in range(5)), interleave=True),
    RopeConfig(rope_theta=30.0),
    replace(YARN, rope_interleave=False),
)
"""Rotary settings of those layers: frequencies, their order, types and softmax scales."""

LAYERS: dict[str, ModelConfig] = {
    "all": lowlat_config(
        DIFFERING, rope=LAYER_ROPES, num_hidden_layers=4, num_nextn_predict_layers=1
    ),
    "experts": lowlat_config(
        (DIFFERING[3], DIFFERING[0], DIFFERING[1]),
        rope=RopeConfig(rope_theta=100.0, rope_interleave=True),
        num_hidden_layers=3,
        moe=MOE,
        num_nextn_predict_layers=2,
    ),
    "still": lowlat_config(
        (replace(MLA, kv_lora_rank=19, qk_rope_head_dim=0), MLA),
        rope=(chosen_frequencies(), LAYER_ROPES[0]),
    ),
    "rope": lowlat_config(MLA, rope=(LAYER_ROPES[0], RopeConfig(rope_theta=7.0))),
}
"""MLA whose layers differ: in everything, in sizes alone, one without positions, in frequencies
alone.
"""

EVERY = {
    **FORMS,
    **{f"combined {name}": config for name, config in COMBINED.items()},
    **{f"layers {name}": config for name, config in LAYERS.items()},
}


def random_model(config: ModelConfig, dtype: torch.dtype, *, seed: int = 7) -> Transformer:
    """Every parameter random and large enough to see, norms and router biases included."""
    model = Transformer(config, dtype=dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("_scale_inv"):
            drawn = drawn.abs()
        if "norm" in name:
            parameter.copy_(1 + 0.2 * drawn)
        elif parameter.dim() == 1:
            parameter.copy_(0.1 * drawn)
        else:
            gain = 5.0 if name.endswith("gate.weight") else 1.2
            width = 1.0 if "embed" in name else gain * parameter.shape[-1] ** -0.5
            parameter.copy_(width * drawn)
    return model
