"""DeepSeek Sparse Attention (DSA, DeepSeek-V3.2, arXiv 2512.02556, section 2.1): index scores, the
exact top-k choice of tokens, and MLA over the chosen KV cache entries.

A query at position t attends to the index_topk tokens s <= t with the largest index scores

    I(t, s) = sum_h w(t, h) relu(q_I(t, h) . k_I(s) / sqrt(d_I)).

Up to index_topk tokens every token is chosen: those queries are left to dense attention. docs/
sparse.md has the equations and the modules.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowlat.ops.norm import accumulation_dtype

BLOCK_ELEMENTS = 2**24
"""Elements of the largest intermediate tensor, which bounds the queries of a block."""

DenseMLA = Callable[..., Tensor]
"""MLA of all visible tokens, with the arguments of the functions in `ops.mla`."""


class IndexQueries(NamedTuple):
    """What the indexer of a layer asks for some tokens."""

    q: Float[Tensor, "tokens index_heads index_dim"]
    """q_I, rotated."""
    weights: Float[Tensor, "tokens index_heads"]
    """w, at least fp32, with the factor H_I^-0.5."""
    topk: int
    """Tokens to choose."""

    def rows(self, own: slice) -> "IndexQueries":
        """The queries of some of the tokens."""
        return IndexQueries(self.q[own], self.weights[own], self.topk)


def index_scores(
    index: IndexQueries, keys: Float[Tensor, "keys index_dim"]
) -> Float[Tensor, "tokens keys"]:
    """I(t, s) of every query and key, computed in fp32 (fp64 for fp64 inputs); not masked."""
    wide = accumulation_dtype(index.q.dtype)
    products = torch.einsum("qhd,kd->qhk", index.q.to(wide), keys.to(wide))
    scores = torch.relu(products * keys.shape[-1] ** -0.5)
    return torch.einsum("qh,qhk->qk", index.weights.to(wide), scores)


def top_positions(
    scores: Float[Tensor, "queries keys"], *, start: int, topk: int
) -> Int[Tensor, "queries topk"]:
    """The `topk` best positions of each query, in ascending order; query i is at position start + i
    and sees the positions up to its own, at least `topk`.

    Exact: of equal scores the lowest positions win. ReLU makes scores of exactly 0, and of -0,
    which is equal to it. A score that is not a number wins, so that it reaches the output.
    """
    query = torch.arange(start, start + len(scores), device=scores.device)[:, None]
    key = torch.arange(scores.shape[1], device=scores.device)
    visible = key <= query
    scores = scores.nan_to_num(
        nan=torch.inf, posinf=torch.inf, neginf=-torch.finfo(scores.dtype).max
    )
    scores = scores.masked_fill(~visible, -torch.inf)
    last = scores.topk(topk, dim=-1).values[:, -1:]
    better, equal = scores > last, scores == last
    missing = topk - better.sum(dim=-1, keepdim=True)
    chosen = better | (equal & (equal.cumsum(dim=-1) <= missing))
    return chosen.nonzero()[:, 1].unflatten(0, (len(scores), topk))


@torch.no_grad()
def choose_tokens(
    index: IndexQueries, keys: Float[Tensor, "keys index_dim"], *, start: int
) -> Int[Tensor, "sparse topk"]:
    """Positions that the last queries attend to: those at positions from index.topk on. Queries are
    at positions start, start + 1, ...; keys from position 0.
    """
    count, heads, _ = index.q.shape
    first = num_dense(count, start, index.topk)
    step = max(1, BLOCK_ELEMENTS // (heads * len(keys)))
    blocks = [torch.empty(0, index.topk, dtype=torch.int64, device=keys.device)]
    for begin in range(first, count, step):
        part = index.rows(slice(begin, begin + step))
        own = keys[: start + begin + len(part.q)]
        scores = index_scores(part, own)
        blocks.append(top_positions(scores, start=start + begin, topk=index.topk))
    return torch.cat(blocks)


def num_dense(count: int, start: int, topk: int) -> int:
    """How many of `count` queries from position `start` see at most `topk` tokens."""
    return min(max(topk - start, 0), count)


def attended_mask(
    visible: Bool[Tensor, "queries keys"], chosen: Int[Tensor, "sparse topk"]
) -> Bool[Tensor, "queries keys"]:
    """The tokens that each query attends to: of the last `sparse` queries those of `chosen`, of the
    others all that are `visible`.
    """
    mask, first = visible.clone(), len(visible) - len(chosen)
    mask[first:] = False
    mask[first:].scatter_(1, chosen.long(), True)
    return mask


def sparse_mla(
    q_nope: Float[Tensor, "queries heads nope_dim"],
    q_rope: Float[Tensor, "queries heads rope_dim"],
    rows: Float[Tensor, "keys kv_a_dim"],
    w_uk: Float[Tensor, "heads nope_dim latent"],
    w_uv: Float[Tensor, "heads v_dim latent"],
    chosen: Int[Tensor, "sparse topk"],
    *,
    start: int,
    scale: float,
    dense: DenseMLA,
) -> Float[Tensor, "queries heads v_dim"]:
    """MLA of queries at positions start, start + 1, ...: `dense` for those that see at most topk
    tokens, the others over the tokens that `choose_tokens` gave them.
    """
    first = num_dense(len(q_nope), start, chosen.shape[1])
    outputs = []
    if first > 0:
        seen = rows[: start + first]
        outputs.append(
            dense(q_nope[:first], q_rope[:first], seen, w_uk, w_uv, start=start, scale=scale)
        )
    if first < len(q_nope):
        outputs.append(
            chosen_mla(q_nope[first:], q_rope[first:], rows, w_uk, w_uv, chosen, scale=scale)
        )
    return torch.cat(outputs)


def chosen_mla(
    q_nope: Float[Tensor, "queries heads nope_dim"],
    q_rope: Float[Tensor, "queries heads rope_dim"],
    rows: Float[Tensor, "keys kv_a_dim"],
    w_uk: Float[Tensor, "heads nope_dim latent"],
    w_uv: Float[Tensor, "heads v_dim latent"],
    chosen: Int[Tensor, "queries topk"],
    *,
    scale: float,
) -> Float[Tensor, "queries heads v_dim"]:
    """Absorbed MLA (`ops.mla`) of each query over its `chosen` rows [c_t ; k_R] alone, which are
    gathered. Scores, softmax and sums are fp32 (fp64 for fp64 inputs).
    """
    wide, latent = accumulation_dtype(q_nope.dtype), w_uv.shape[-1]
    query = torch.cat([torch.einsum("qhn,hnc->qhc", q_nope, w_uk), q_rope], dim=-1)
    step = max(1, BLOCK_ELEMENTS // (chosen.shape[1] * rows.shape[1]))
    mixed = []
    for queries, positions in zip(query.split(step), chosen.split(step), strict=True):
        picked = rows[positions].to(wide)
        scores = (queries.to(wide) * scale) @ picked.transpose(1, 2)
        mixed.append((scores.softmax(dim=-1) @ picked[..., :latent]).to(query.dtype))
    return torch.einsum("qhc,hvc->qhv", torch.cat(mixed), w_uv)
