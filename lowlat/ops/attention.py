"""Causal flash attention in plain PyTorch: blocks with an online softmax and no full score matrix;
d_qk may differ from d_v (FlashAttention, arXiv 2205.14135, algorithm 1).

Keys and values are a function of block boundaries, so that expanded MLA builds them block by block.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.ops.norm import accumulation_dtype

KeyValueBlock = Callable[[int, int], tuple[Tensor, Tensor]]
"""(first, last) -> keys [last - first, kv_heads, d_qk] and values [last - first, kv_heads, d_v]."""

KEY_BLOCK = 2048
QUERY_BLOCK = 512


def causal_attention(
    q: Float[Tensor, "queries heads d_qk"],
    key_values: KeyValueBlock,
    *,
    start: int,
    scale: float,
    window: int | None = None,
    key_block: int = KEY_BLOCK,
    query_block: int = QUERY_BLOCK,
) -> Float[Tensor, "queries heads d_v"]:
    """Attention of queries at positions start, start + 1, ... over all keys up to their own
    position.

    `scale` multiplies the scores; `window` limits a query to that many latest keys, itself
    included. Scores, softmax and sums are fp32 (fp64 for fp64 inputs); the result has q's dtype.
    Query heads share key heads in consecutive groups of heads / kv_heads.
    """
    outputs = []
    for first in range(0, q.shape[0], query_block):
        block = q[first : first + query_block]
        outputs.append(_attend(block, key_values, start + first, scale, window, key_block))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(
    q: Float[Tensor, "queries heads d_qk"],
    key_values: KeyValueBlock,
    start: int,
    scale: float,
    window: int | None,
    key_block: int,
) -> Float[Tensor, "queries heads d_v"]:
    queries = q.shape[0]
    end = start + queries
    oldest = 0 if window is None else max(0, start - window + 1)
    state = None
    for first in range(oldest, end, key_block):
        last = min(first + key_block, end)
        k, v = key_values(first, last)
        scores = _scores(q, k, scale)
        masked = _mask(start, queries, first, last, window, q.device)
        if masked is not None:
            scores = scores.masked_fill(masked, float("-inf"))
        state = _merge(state, scores, v)
    assert state is not None
    _, total, weighted = state
    # kv_heads x group x queries x d_v -> queries x heads x d_v
    return (weighted / total).flatten(0, 1).transpose(0, 1).to(q.dtype)


def _scores(q: Tensor, k: Tensor, scale: float) -> Float[Tensor, "kv_heads group queries keys"]:
    wide = accumulation_dtype(q.dtype)
    # queries x heads x d -> kv_heads x group x queries x d
    grouped = q.to(wide).transpose(0, 1).unflatten(0, (k.shape[1], -1))
    return (grouped * scale) @ k.to(wide).permute(1, 2, 0)[:, None]


def _mask(
    start: int, queries: int, first: int, last: int, window: int | None, device: torch.device
) -> Tensor | None:
    """Attention mask: causal, with a sliding window if any. [queries, keys], true where a query
    must not attend; None if nothing is masked.
    """
    inside_window = window is None or first > start + queries - 1 - window
    if last <= start + 1 and inside_window:
        return None
    query = torch.arange(start, start + queries, device=device)[:, None]
    key = torch.arange(first, last, device=device)[None, :]
    masked = key > query
    return masked if window is None else masked | (key <= query - window)


def _merge(
    state: tuple[Tensor, Tensor, Tensor] | None, scores: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the online softmax over (largest score, sum of exponentials, weighted values)."""
    top = scores.amax(dim=-1, keepdim=True)
    if state is not None:
        top = torch.maximum(top, state[0])
    # A query without a visible key so far has -inf; exp(-inf - 0) is a clean zero.
    base = top.masked_fill(top == float("-inf"), 0.0)
    weights = (scores - base).exp()
    total = weights.sum(dim=-1, keepdim=True)
    weighted = weights @ v.to(weights.dtype).transpose(0, 1)[:, None]
    if state is None:
        return top, total, weighted
    keep = (state[0] - base).exp()
    return top, state[1] * keep + total, state[2] * keep + weighted
