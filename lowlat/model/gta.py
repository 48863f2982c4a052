"""Grouped-Tied Attention (GTA): one state per group of heads is both key and value (arXiv
2505.21487).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import GTAConfig, ModelConfig
from lowlat.model.linear import Linear
from lowlat.ops.gta import TiedLayout
from lowlat.ops.rope import RotaryTable, apply_rope


class GTA(nn.Module):
    """Projections, and RoPE on the trailing channels; `TiedLayout` defines the KV cache entry."""

    def __init__(
        self, config: ModelConfig, attention: GTAConfig, layer: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dims = attention
        self.scale = config.softmax_scale_of(layer)
        self.interleave = config.rope_of(layer).rope_interleave
        self.layout = TiedLayout(attention.num_key_value_heads, attention.head_dim)
        hidden, q_dim = config.hidden_size, attention.num_attention_heads * attention.head_dim
        self.q_proj = Linear(hidden, q_dim, dtype=dtype)
        # The tied states of all groups, then the key to be rotated.
        self.kv_proj_with_mqa = Linear(hidden, attention.entry_dim, dtype=dtype)
        self.o_proj = Linear(q_dim, hidden, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        dims = self.dims
        q = self.q_proj(x).unflatten(-1, (dims.num_attention_heads, dims.head_dim))
        q_nope, q_rope = q.split([dims.qk_nope_head_dim, dims.qk_rope_head_dim], dim=-1)
        q = torch.cat([q_nope, apply_rope(q_rope, rope, interleave=self.interleave)], dim=-1)
        tied, k_rope = self.kv_proj_with_mqa(x).split([dims.tied_dim, dims.rope_dim], dim=-1)
        k_rope = apply_rope(k_rope[:, None], rope, interleave=self.interleave)[:, 0]
        entries = torch.cat([tied, k_rope], dim=-1)
        out = attention.attend(self.layer, q, entries, self.layout, self.scale)
        return self.o_proj(out.flatten(1))
