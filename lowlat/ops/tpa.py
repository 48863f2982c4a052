"""KV cache entries of Tensor Product Attention, [B_K ; B_V ; A_K ; A_V] (arXiv 2501.06425, sections
3 and 5).

The keys of a token are K = A_K^T B_K / R_K: head factors A_K [R_K, heads] times channel factors B_K
[R_K, head_dim], rotated before they are cached; values likewise. Expanded: K and V are built.
Factored: queries meet the channel factors, which all heads share, and head factors weight the
products, so that decoding builds no keys. Both give the same numbers up to rounding.
"""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.ops.layout import EntryLayout
from lowlat.ops.norm import accumulation_dtype

PRODUCTS = 2**23
"""Approximate number of query-factor products in memory at once."""


def outer_mean(
    a: Float[Tensor, "tokens rank heads"], b: Float[Tensor, "tokens rank head_dim"]
) -> Float[Tensor, "tokens heads head_dim"]:
    """The mean over the rank of a's and b's outer products: A^T B / R."""
    return a.transpose(1, 2) @ b / a.shape[1]


@final
@dataclass(frozen=True, slots=True)
class FactorLayout(EntryLayout):
    """Factors of the keys and values of `heads` heads of `head_dim` channels."""

    heads: int
    head_dim: int
    k_rank: int
    v_rank: int

    def factors(
        self, rows: Float[Tensor, "keys entry_dim"]
    ) -> tuple[
        Float[Tensor, "keys k_rank head_dim"],
        Float[Tensor, "keys v_rank head_dim"],
        Float[Tensor, "keys k_rank heads"],
        Float[Tensor, "keys v_rank heads"],
    ]:
        """B_K, B_V, A_K, A_V of every entry."""
        ranks = (self.k_rank, self.v_rank)
        sizes = [rank * width for width in (self.head_dim, self.heads) for rank in ranks]
        b_k, b_v, a_k, a_v = rows.split(sizes, dim=1)
        return (
            b_k.unflatten(1, (self.k_rank, self.head_dim)),
            b_v.unflatten(1, (self.v_rank, self.head_dim)),
            a_k.unflatten(1, (self.k_rank, self.heads)),
            a_v.unflatten(1, (self.v_rank, self.heads)),
        )

    def expand(
        self, rows: Float[Tensor, "keys entry_dim"]
    ) -> tuple[Float[Tensor, "keys heads head_dim"], Float[Tensor, "keys heads head_dim"]]:
        b_k, b_v, a_k, a_v = self.factors(rows)
        return outer_mean(a_k, b_k), outer_mean(a_v, b_v)

    def attend(
        self,
        q: Float[Tensor, "queries heads head_dim"],
        rows: Float[Tensor, "keys entry_dim"],
        *,
        start: int,
        scale: float,
    ) -> Float[Tensor, "queries heads head_dim"]:
        """Factored attention; scores, softmax and sums in fp32 (fp64 for fp64 inputs)."""
        wide = accumulation_dtype(q.dtype)
        per_query = self.heads * len(rows) * max(self.k_rank, self.v_rank)
        step = max(1, PRODUCTS // per_query)
        outputs = []
        for first in range(0, len(q), step):
            block, end = q[first : first + step], start + min(first + step, len(q))
            factors = self.factors(rows[:end].to(wide))
            outputs.append(_factored(block.to(wide) * scale, factors, start + first))
        return torch.cat(outputs).to(q.dtype)


def _factored(
    q: Float[Tensor, "queries heads head_dim"],
    factors: tuple[Tensor, Tensor, Tensor, Tensor],
    start: int,
) -> Float[Tensor, "queries heads head_dim"]:
    """Attention of scaled queries at positions start, start + 1, ... over all entries given."""
    b_k, b_v, a_k, a_v = factors
    keys, k_rank, _ = a_k.shape
    products = (q @ b_k.flatten(0, 1).T).unflatten(-1, (keys, k_rank))
    # keys x rank x heads -> heads x keys x rank
    scores = (products * (a_k / k_rank).permute(2, 0, 1)).sum(dim=-1)
    position = torch.arange(start, start + len(q), device=q.device)
    hidden = torch.arange(keys, device=q.device) > position[:, None]
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(dim=-1)
    weighted = weights[..., None] * (a_v / a_v.shape[1]).permute(2, 0, 1)
    return weighted.flatten(-2) @ b_v.flatten(0, 1)
