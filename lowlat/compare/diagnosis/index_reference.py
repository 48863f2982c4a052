"""Reference indexer of sparse attention (DSA, DeepSeek-V3.2 section 2.1), with optional known
mistakes.

Shares no code with `model.indexer` and `ops.sparse_attention`, which it checks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowlat.compare.diagnosis.rope_reference import RotationVariant, cos_sin_scale, rotate
from lowlat.config.model import RopeConfig

NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexVariant:
    """A way to compute index scores; the defaults of the last four fields are correct."""

    interleave: bool
    """Whether rotated pairs are neighbouring channels (2i, 2i+1)."""
    scale: float
    """Factor on products of index queries and keys."""
    last: bool = False
    """Whether the last channels rotate, not the first."""
    relu: bool = True
    head_scale: bool = True
    """Whether head weights have the factor H_I^-0.5."""
    norm_bias: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexInputs:
    """Recorded inputs of the index scores of a layer."""

    x: Float[Tensor, "tokens hidden"]
    q: Float[Tensor, "tokens index_heads index_dim"]
    """Before the rotation."""
    k: Float[Tensor, "tokens index_dim"]
    """Before the norm."""
    norm: Float[Tensor, " index_dim"]
    norm_bias: Float[Tensor, " index_dim"]
    head_weight: Float[Tensor, "index_heads hidden"]
    positions: Int[Tensor, " tokens"]
    rope: RopeConfig
    rope_dim: int
    """Channels that rotate."""


def index_scores(given: IndexInputs, variant: IndexVariant) -> Float[Tensor, "tokens tokens"]:
    """The score of every key for every query, not masked."""
    centred = given.k - given.k.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + NORM_EPS).sqrt()
    keys = centred / deviation * given.norm
    if variant.norm_bias:
        keys = keys + given.norm_bias
    q, k = (_turned(x, given, variant) for x in (given.q, keys[:, None]))
    products = torch.einsum("qhd,kd->hqk", q, k[:, 0]) * variant.scale
    weights = (given.x @ given.head_weight.T).T[..., None]
    if variant.head_scale:
        weights = weights / len(given.head_weight) ** 0.5
    return (weights * (products.clamp(min=0) if variant.relu else products)).sum(dim=0)


def _turned(x: Tensor, given: IndexInputs, variant: IndexVariant) -> Tensor:
    rest = x.shape[-1] - given.rope_dim
    sizes = [rest, given.rope_dim] if variant.last else [given.rope_dim, rest]
    parts = list(x.split(sizes, dim=-1))
    place = 1 if variant.last else 0
    turn = RotationVariant(variant.interleave, "config", "as_is")
    turned = rotate(parts[place], given.positions, given.rope, turn)
    parts[place] = turned * cos_sin_scale(given.rope)
    return torch.cat(parts, dim=-1)


def follows(
    choice: Bool[Tensor, "tokens tokens"],
    scores: Float[Tensor, "tokens tokens"],
    topk: int,
    limit: float,
) -> bool:
    """Whether each query attends to the `topk` visible tokens with the highest scores, which may
    differ by `limit` of the largest; up to `topk` tokens to all.
    """
    visible = torch.ones_like(choice).tril()
    tolerance = limit * scores.masked_fill(~visible, 0.0).abs().amax(dim=1)
    least = scores.masked_fill(~choice, torch.inf).amin(dim=1)
    most = scores.masked_fill(choice | ~visible, -torch.inf).amax(dim=1)
    counted = choice.sum(dim=1) == visible.sum(dim=1).clamp(max=topk)
    return bool((counted & (least >= most - tolerance) & ~(choice & ~visible).any(dim=1)).all())


def follows_unmasked(
    choice: Bool[Tensor, "tokens tokens"], scores: Float[Tensor, "tokens tokens"], topk: int
) -> float:
    """The share of queries with more than `topk` tokens that attend to those visible ones which are
    among the `topk` highest scores of all tokens, later ones included.
    """
    visible = torch.ones_like(choice).tril()
    best = scores.topk(min(topk, len(scores)), dim=1).indices
    expected = torch.zeros_like(choice).scatter_(1, best, True)
    same = ((expected ^ choice) & visible).sum(dim=1) == 0
    return float(same[topk:].double().mean()) if len(choice) > topk else 0.0
