"""One decoder layer: attention and MLP or MoE, each behind a norm and inside a residual."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.model.gqa import GQA
from lowlat.model.linear import RMSNorm
from lowlat.model.mla import MLA
from lowlat.model.moe import MLP, MoE


class DecoderLayer(nn.Module):
    """Layer number `layer`; MTP modules are numbered after the decoder layers."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        attention = config.attention
        if isinstance(attention, MLAConfig):
            self.self_attn = MLA(config, attention, layer, dtype=dtype)
        else:
            self.self_attn = GQA(config, attention, layer, dtype=dtype)
        if config.moe is not None and config.is_moe_layer(layer):
            self.mlp = MoE(config, config.moe, dtype=dtype)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, dtype=dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(
            config.hidden_size, config.rms_norm_eps, dtype=dtype
        )

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: tuple[Tensor, Tensor],
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        x = x + self.self_attn(self.input_layernorm(x), rope, attention)
        return x + self.mlp(self.post_attention_layernorm(x))
