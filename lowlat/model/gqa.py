"""Grouped-query attention (GQA, arXiv 2305.13245): one key-value head per group of query heads; MHA
and MQA are its extremes.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import GQAConfig, ModelConfig
from lowlat.model.linear import Linear, RMSNorm
from lowlat.ops.rope import RotaryTable, apply_rope


class GQA(nn.Module):
    """Projections, optional QK-norm and RoPE; the backend caches [K ; V] and attends."""

    def __init__(
        self, config: ModelConfig, attention: GQAConfig, layer: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dims = attention
        self.scale = config.softmax_scale_of(layer)
        self.window = config.window(layer)
        self.interleave = config.rope_of(layer).rope_interleave
        hidden, bias = config.hidden_size, attention.qkv_bias
        q_dim = attention.num_attention_heads * attention.head_dim
        kv_dim = attention.num_key_value_heads * attention.head_dim
        self.q_proj = Linear(hidden, q_dim, bias=bias, dtype=dtype)
        self.k_proj = Linear(hidden, kv_dim, bias=bias, dtype=dtype)
        self.v_proj = Linear(hidden, kv_dim, bias=bias, dtype=dtype)
        self.o_proj = Linear(q_dim, hidden, bias=attention.o_bias, dtype=dtype)
        if attention.qk_norm:
            self.q_norm = RMSNorm(attention.head_dim, config.rms_norm_eps, dtype=dtype)
            self.k_norm = RMSNorm(attention.head_dim, config.rms_norm_eps, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        width = self.dims.head_dim
        q = self.q_proj(x).unflatten(-1, (-1, width))
        k = self.k_proj(x).unflatten(-1, (-1, width))
        v = self.v_proj(x).unflatten(-1, (-1, width))
        if self.dims.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = apply_rope(q, rope, interleave=self.interleave)
        k = apply_rope(k, rope, interleave=self.interleave)
        out = attention.gqa(self.layer, q, k, v, self.scale, self.window)
        return self.o_proj(out.flatten(1))
