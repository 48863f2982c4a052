"""Tensor Product Attention (TPA, arXiv 2501.06425 section 3): queries, keys and values are means of
outer products of factors that depend on the token.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.config.model import ModelConfig, TPAConfig
from lowlat.model.linear import Linear
from lowlat.ops.rope import RotaryTable, apply_rope
from lowlat.ops.tpa import FactorLayout, outer_mean


class TPA(nn.Module):
    """Projections to the factors, and RoPE on the channel factors of queries and keys, which
    rotates every head. `FactorLayout` defines the KV cache entry.
    """

    def __init__(
        self, config: ModelConfig, attention: TPAConfig, layer: int, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.layer = layer
        self.dims = attention
        self.scale = config.softmax_scale_of(layer)
        self.interleave = config.rope_of(layer).rope_interleave
        hidden, heads, width = (
            config.hidden_size,
            attention.num_attention_heads,
            attention.head_dim,
        )
        self.layout = FactorLayout(heads, width, attention.k_rank, attention.v_rank)
        if attention.q_rank is None:
            self.q_proj = Linear(hidden, heads * width, dtype=dtype)
        else:
            self.q_a_proj = Linear(hidden, attention.q_rank * heads, dtype=dtype)
            self.q_b_proj = Linear(hidden, attention.q_rank * width, dtype=dtype)
        self.k_a_proj = Linear(hidden, attention.k_rank * heads, dtype=dtype)
        self.k_b_proj = Linear(hidden, attention.k_rank * width, dtype=dtype)
        self.v_a_proj = Linear(hidden, attention.v_rank * heads, dtype=dtype)
        self.v_b_proj = Linear(hidden, attention.v_rank * width, dtype=dtype)
        self.o_proj = Linear(heads * width, hidden, dtype=dtype)

    def forward(
        self,
        x: Float[Tensor, "tokens hidden"],
        rope: RotaryTable,
        attention: AttentionBackend,
    ) -> Float[Tensor, "tokens hidden"]:
        q, entries = self.queries(x, rope), self.entries(x, rope)
        out = attention.attend(self.layer, q, entries, self.layout, self.scale)
        return self.o_proj(out.flatten(1))

    def queries(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> Float[Tensor, "tokens heads head_dim"]:
        """Rotated queries."""
        dims = self.dims
        if dims.q_rank is None:
            q = self.q_proj(x).unflatten(-1, (dims.num_attention_heads, dims.head_dim))
            return apply_rope(q, rope, interleave=self.interleave)
        a = self.q_a_proj(x).unflatten(-1, (dims.q_rank, dims.num_attention_heads))
        b = self.q_b_proj(x).unflatten(-1, (dims.q_rank, dims.head_dim))
        return outer_mean(a, apply_rope(b, rope, interleave=self.interleave))

    def entries(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> Float[Tensor, "tokens entry_dim"]:
        """KV cache entries [B_K ; B_V ; A_K ; A_V], B_K rotated."""
        b_k = self.k_b_proj(x).unflatten(-1, (self.dims.k_rank, self.dims.head_dim))
        b_k = apply_rope(b_k, rope, interleave=self.interleave).flatten(1)
        return torch.cat([b_k, self.v_b_proj(x), self.k_a_proj(x), self.v_a_proj(x)], dim=-1)

    def factor_shapes(self) -> list[tuple[Linear, tuple[int, int]]]:
        """The factor projections: those of head factors with (heads, rank), those of channel
        factors with (rank, head_dim).
        """
        dims = self.dims
        heads, width = dims.num_attention_heads, dims.head_dim
        shapes = [
            (self.k_a_proj, (heads, dims.k_rank)),
            (self.k_b_proj, (dims.k_rank, width)),
            (self.v_a_proj, (heads, dims.v_rank)),
            (self.v_b_proj, (dims.v_rank, width)),
        ]
        if dims.q_rank is None:
            return shapes
        queries = [(self.q_a_proj, (heads, dims.q_rank)), (self.q_b_proj, (dims.q_rank, width))]
        return queries + shapes
