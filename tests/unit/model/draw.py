"""Small configs with prime sizes, and models with every weight random: norms and router biases
too.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowlat.config.model import AttentionConfig, ModelConfig, RopeConfig
from lowlat.model.transformer import Transformer
from lowlat.ops.rope import RotaryEmbedding, RotaryTable
from tests import configs, lowlat_configs
from tests.configs import MLA, model_config
from tests.packed_attention import PackedAttention

YARN = replace(configs.YARN, factor=8.0, original_max_position_embeddings=64, mscale_all_dim=1.1)
MOE = replace(configs.MOE, n_routed_experts=10, n_group=5, topk_group=2)
GQA = replace(configs.GQA, qkv_bias=True, o_bias=True, qk_norm=True)


def mla_config(**changes: Any) -> ModelConfig:
    """MLA with a query latent and YaRN; a dense layer, then a grouped mixture of experts."""
    fields = {"attention": MLA, "rope": YARN, "moe": MOE, "max_position_embeddings": 4096}
    return model_config("deepseek_v3", **(fields | changes))


def gqa_config(**changes: Any) -> ModelConfig:
    """GQA with biases and QK-norm; a sliding window on the second layer only."""
    fields = {
        "attention": GQA,
        "rope": RopeConfig(rope_theta=1000.0),
        "sliding_window": 4,
        "sliding_window_layers": (1,),
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
    }
    return model_config("qwen3", **(fields | changes))


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


def attention_case(
    attention: AttentionConfig, *, interleave: bool
) -> tuple[torch.nn.Module, Tensor, PackedAttention, RotaryTable]:
    """The attention of a layer in fp64, 17 tokens to attend, and what they attend with."""
    rope = RopeConfig(rope_theta=50.0, rope_interleave=interleave)
    config = lowlat_configs.lowlat_config(attention, rope=rope)
    module = lowlat_configs.random_model(config, torch.float64).layers[0].self_attn
    x = torch.randn(17, 23, dtype=torch.float64)
    packed = PackedAttention([17])
    table = RotaryEmbedding(rope, attention.rope_dim)(packed.positions())
    return module, x, packed, table
