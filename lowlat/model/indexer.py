"""Lightning indexer of DeepSeek Sparse Attention (DSA, DeepSeek-V3.2, arXiv 2512.02556, section
2.1): the queries, head weights and keys whose scores choose the tokens that MLA attends to.

The scores and the choice are in `ops.sparse_attention`. There is no Hadamard transform: it is
orthogonal and changes no score.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.config.model import IndexerConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.model.linear import LayerNorm, Linear
from lowlat.ops.norm import accumulation_dtype
from lowlat.ops.rope import RotaryTable, apply_rope
from lowlat.ops.sparse_attention import IndexQueries

KEY_NORM_EPS = 1e-6
"""Epsilon of k_norm in every released implementation."""


def distinct_pairs(rope: RopeConfig, rope_dim: int) -> int:
    """Number of distinct RoPE frequencies of a key of `rope_dim` channels. A model converted
    exactly from GQA repeats those of a key head for every group.
    """
    factors, pairs = rope.pair_factors or (), rope_dim // 2
    periods = (n for n in range(1, pairs) if pairs % n == 0)
    repeats = (n for n in periods if factors == factors[:n] * (pairs // n))
    return next(repeats, pairs) if factors else pairs


def rotary_pairs(rope: RopeConfig, rope_dim: int, index_dim: int) -> slice:
    """RoPE pairs of a key of `rope_dim` channels whose frequencies the `index_dim` rotary channels
    of an indexer use: every n-th of the distinct ones, the base frequencies of a narrower head.
    """
    pairs = index_dim // 2
    step = max(1, distinct_pairs(rope, rope_dim) // max(1, pairs))
    return slice(0, step * pairs, step)


class HeadWeights(nn.Module):
    """w of every index head, in fp32 from weights that are never quantized, like the router's:
    near ties depend on them.
    """

    def __init__(self, hidden_size: int, heads: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, hidden_size, dtype=dtype))

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens index_heads"]:
        wide = accumulation_dtype(x.dtype)
        return F.linear(x.to(wide), self.weight.to(wide)) * len(self.weight) ** -0.5


class Indexer(nn.Module):
    """q_I from the query latent (from the layer's input, if there is none), w and k_I from the
    layer's input. The first index_rope_head_dim channels of q_I and k_I rotate, in a layout of
    their own: half-split in DeepSeek-V3.2, interleaved in GLM-5.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: MLAConfig,
        indexer: IndexerConfig,
        rope: RopeConfig,
        *,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.dims = indexer
        self.rope_dim = indexer.index_rope_head_dim or attention.qk_rope_head_dim
        self.pairs = rotary_pairs(rope, attention.qk_rope_head_dim, self.rope_dim)
        hidden, heads, width = (
            config.hidden_size,
            indexer.index_n_heads,
            indexer.index_head_dim,
        )
        self.wq_b = Linear(attention.q_lora_rank or hidden, heads * width, dtype=dtype)
        self.wk = Linear(hidden, width, dtype=dtype)
        self.k_norm = LayerNorm(width, KEY_NORM_EPS, dtype=dtype)
        self.weights_proj = HeadWeights(hidden, heads, dtype=dtype)

    def queries(
        self,
        x: Float[Tensor, "tokens hidden"],
        q_latent: Float[Tensor, "tokens width"],
        rope: RotaryTable,
    ) -> IndexQueries:
        """Index queries, and the weights of the heads."""
        q = self.wq_b(q_latent).unflatten(-1, (self.dims.index_n_heads, -1))
        return IndexQueries(self._rotate(q, rope), self.weights_proj(x), self.dims.index_topk)

    def keys(
        self, x: Float[Tensor, "tokens hidden"], rope: RotaryTable
    ) -> Float[Tensor, "tokens index_dim"]:
        """The index key of each token: part of its KV cache entry."""
        return self._rotate(self.k_norm(self.wk(x))[:, None], rope)[:, 0]

    def _rotate(
        self, x: Float[Tensor, "tokens heads index_dim"], rope: RotaryTable
    ) -> Float[Tensor, "tokens heads index_dim"]:
        rotary, rest = x.split([self.rope_dim, x.shape[-1] - self.rope_dim], dim=-1)
        cos, sin = (each[:, self.pairs].contiguous() for each in (rope.cos, rope.sin))
        rope = rope._replace(cos=cos, sin=sin)
        rotary = apply_rope(rotary, rope, interleave=self.dims.rope_interleave)
        return torch.cat([rotary, rest], dim=-1)
