"""The rotation of queries and keys once more, with the mistakes people make in it as candidates.

Owns what positions, layouts and factors a rotation may have been made with, and which of them
reproduces what was seen.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.config.model import RopeConfig, yarn_mscale
from lowlat.ops.rope import inverse_frequencies


class Turn(NamedTuple):
    """One way to rotate."""

    interleave: bool
    """Pairs are neighbours."""
    frequencies: str
    """config, unscaled, or none (not rotated)."""
    order: str
    """Where the rotated channels end up: canonical, as_is or twice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """The way that reproduces a rotated tensor best."""

    turn: Turn
    ratio: float
    """The factor on cos and sin that was found."""
    error: float
    """What is left, relative."""


def best_fit(
    before: Float[Tensor, "tokens heads rope"],
    after: Float[Tensor, "tokens heads rope"],
    positions: Tensor,
    rope: RopeConfig,
    limit: float,
) -> Fit:
    """The way to rotate `before` that reproduces `after` (canonical channels) best: the right one
    if it leaves no more than `limit`, as it does where ways coincide.
    """
    found: list[Fit] = []
    for turn in ways(rope):
        made = turned(before, positions, rope, turn)
        size = float((made * made).sum())
        ratio = float((made * after).sum()) / size if size else 0.0
        rest = float((after - ratio * made).norm() / after.norm().clamp_min(1e-30))
        found.append(Fit(turn=turn, ratio=ratio, error=rest))
        if rest <= limit:
            break
    return min(found, key=lambda fit: fit.error)


def right(rope: RopeConfig) -> Turn:
    return Turn(rope.rope_interleave, "config", "canonical")


def ways(rope: RopeConfig) -> Iterator[Turn]:
    """The right one, then mistakes."""
    yield right(rope)
    scaled = rope.rope_type != "default"
    for interleave in (rope.rope_interleave, not rope.rope_interleave):
        for frequencies in ("config", *(["unscaled"] if scaled else []), "none"):
            for order in ("canonical", "as_is", "twice"):
                turn = Turn(interleave, frequencies, order)
                if turn != right(rope):
                    yield turn


def turned(x: Tensor, positions: Tensor, rope: RopeConfig, turn: Turn) -> Tensor:
    """`x` rotated one way, with cos and sin as they are, in the channel order of `turn`."""
    angles = positions[:, None].to(torch.float32) * _frequencies(rope, x.shape[-1], turn)
    cos, sin = (t.to(x.dtype)[:, None] for t in (angles.cos(), angles.sin()))
    real, imaginary = _pairs(x, turn.interleave)
    out = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    joined = torch.stack(out, dim=-1).flatten(-2) if turn.interleave else torch.cat(out, dim=-1)
    # What was seen has been put into canonical order as the config's layout asks.
    if turn.order == "canonical":
        return torch.cat(_pairs(joined, rope.rope_interleave), dim=-1)
    if turn.order == "as_is":
        return joined
    return torch.cat(_pairs(torch.cat(out, dim=-1), rope.rope_interleave), dim=-1)


def _pairs(x: Tensor, interleave: bool) -> tuple[Tensor, Tensor]:
    if interleave:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


@lru_cache(maxsize=64)
def _table(rope: RopeConfig, dim: int) -> Tensor:
    return inverse_frequencies(rope, dim)


def _frequencies(rope: RopeConfig, dim: int, turn: Turn) -> Tensor:
    if turn.frequencies == "none":
        return torch.zeros(dim // 2)
    plain = replace(rope, rope_type="default", pair_factors=None)
    return _table(plain if turn.frequencies == "unscaled" else rope, dim)


def magnitude(rope: RopeConfig) -> float:
    """The factor on cos and sin: YaRN's m(mscale) / m(mscale_all_dim), 1 for others."""
    return magnitudes(rope)[0][0]


def magnitudes(rope: RopeConfig) -> list[tuple[float, str]]:
    """The right factor, then wrong ones and how people come by them: of equal ones the first is
    meant.
    """
    if rope.attention_factor is not None:
        return [(rope.attention_factor, ""), (1.0, "attention_factor is not applied")]
    if rope.rope_type != "yarn":
        return [(1.0, "")]
    top = yarn_mscale(rope.factor, rope.mscale or 0.0)
    bottom = yarn_mscale(rope.factor, rope.mscale_all_dim or 0.0)
    plain = yarn_mscale(rope.factor, 1.0)
    proper = top / bottom if rope.mscale and rope.mscale_all_dim else plain
    return [
        (proper, ""),
        (1.0, "the factor is not applied"),
        (top, "the denominator m(mscale_all_dim) is missing"),
        (bottom, "m(mscale_all_dim) stands alone"),
        (plain, "mscale and mscale_all_dim are not read"),
        (proper * proper, "the factor is applied twice"),
    ]
