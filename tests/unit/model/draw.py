"""Small configs with prime sizes, and models with every weight random: norms and router biases
too.
"""

from typing import Any

import torch

from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from lowlat.model.transformer import Transformer

YARN = RopeConfig(
    rope_theta=10000.0,
    rope_type="yarn",
    rope_interleave=True,
    factor=8.0,
    original_max_position_embeddings=64,
    mscale=0.7,
    mscale_all_dim=1.1,
)


def mla_config(**changes: Any) -> ModelConfig:
    """MLA with a query latent and YaRN; a dense layer, then a grouped mixture of experts."""
    attention = MLAConfig(
        num_attention_heads=3,
        kv_lora_rank=13,
        q_lora_rank=11,
        qk_nope_head_dim=5,
        qk_rope_head_dim=6,
        v_head_dim=7,
    )
    moe = MoEConfig(
        n_routed_experts=10,
        num_experts_per_tok=3,
        n_shared_experts=2,
        moe_intermediate_size=5,
        first_k_dense_replace=1,
        n_group=5,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    return _config("deepseek_v3", {"attention": attention, "rope": YARN, "moe": moe} | changes)


def gqa_config(**changes: Any) -> ModelConfig:
    """GQA with biases and QK-norm; a sliding window on the second layer only."""
    attention = GQAConfig(
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=10,
        qkv_bias=True,
        o_bias=True,
        qk_norm=True,
    )
    fields = {
        "attention": attention,
        "rope": RopeConfig(rope_theta=1000.0),
        "sliding_window": 4,
        "sliding_window_layers": (1,),
        "tie_word_embeddings": True,
    }
    return _config("qwen3", fields | changes)


def _config(model_type: str, fields: dict[str, Any]) -> ModelConfig:
    common = {
        "model_type": model_type,
        "hidden_size": 23,
        "intermediate_size": 19,
        "num_hidden_layers": 2,
        "vocab_size": 41,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    return ModelConfig(**(common | fields))


def random_model(config: ModelConfig, *, dtype: torch.dtype = torch.float64) -> Transformer:
    model = Transformer(config, dtype=dtype)
    fill(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Norm weights near 1, router biases with both signs, everything else large enough to see."""
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape) * (
            0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        )
        parameter.copy_(1 + drawn if "norm" in name else drawn)
