"""Decoder layer: pre-norm attention and MLP or MoE, each with a residual connection."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import (
    GLAConfig,
    GQAConfig,
    GTAConfig,
    MLAConfig,
    ModelConfig,
    TPAConfig,
)
from lowlat.model.gla import GLA
from lowlat.model.gqa import GQA
from lowlat.model.gta import GTA
from lowlat.model.linear import RMSNorm, scaled
from lowlat.model.mla import MLA
from lowlat.model.moe import MLP, MoE
from lowlat.model.tpa import TPA
from lowlat.ops.rope import RotaryTable


class DecoderLayer(nn.Module):
    """Layer number `layer`; MTP modules are numbered after the decoder layers."""

    def __init__(self, config: ModelConfig, layer: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.residual_scale = config.residual_scale
        self.self_attn = new_attention(config, layer, dtype=dtype)
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
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        x = x + self.attend(x, rope, attention)
        return x + self.feed_forward(x)

    def attend(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        """What attention adds to the residual stream `x`."""
        added = self.self_attn(self.input_layernorm(x), rope, attention)
        return scaled(added, self.residual_scale)

    def feed_forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """What MLP or experts add to the residual stream `x`, which includes the attention."""
        return scaled(self.mlp(self.post_attention_layernorm(x)), self.residual_scale)


def new_attention(
    config: ModelConfig, layer: int, *, dtype: torch.dtype
) -> MLA | GQA | GLA | GTA | TPA:
    """The attention module of `layer`, of the kind in the config; its weights are unfilled."""
    match config.attention_of(layer):
        case MLAConfig() as attention:
            return MLA(config, attention, layer, dtype=dtype)
        case GQAConfig() as attention:
            return GQA(config, attention, layer, dtype=dtype)
        case GLAConfig() as attention:
            return GLA(config, attention, layer, dtype=dtype)
        case GTAConfig() as attention:
            return GTA(config, attention, layer, dtype=dtype)
        case TPAConfig() as attention:
            return TPA(config, attention, layer, dtype=dtype)
