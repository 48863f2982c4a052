"""Reference RoPE with known mistakes, and the variant that reproduces a recorded rotation.

Variants differ in channel pairing, frequencies, channel order, positions and scale of cos and sin.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.config.model import RopeConfig, yarn_mscale
from lowlat.ops.rope import inverse_frequencies

LARGEST_OFFSET = 4096
"""Largest offset of positions that is tried; that of the last token, if larger."""


class RotationVariant(NamedTuple):
    """A way to apply RoPE."""

    interleave: bool
    """Whether pairs are neighbouring channels (2i, 2i+1)."""
    frequencies: str
    """config, unscaled, or none (no rotation)."""
    order: str
    """Order of the rotated channels: canonical, as_is (unchanged) or twice (reordered twice)."""
    offset: int = 0
    """Added to all positions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RotationFit:
    """The variant that reproduces a rotated tensor best."""

    variant: RotationVariant
    ratio: float
    """Scale of cos and sin."""
    error: float
    """Relative residual."""


def best_fit(
    before: Float[Tensor, "tokens heads rope"],
    after: Float[Tensor, "tokens heads rope"],
    positions: Tensor,
    rope: RopeConfig,
    limit: float,
) -> RotationFit:
    """The first variant, starting with the correct one, that rotates `before` into `after`
    (canonical channels) with a residual of at most `limit`; otherwise the best variant.
    """
    found: list[RotationFit] = []
    for variant in variants(rope, lambda: nearest_offset(before, after, positions, rope)):
        rotated = rotate(before, positions, rope, variant)
        size = float((rotated * rotated).sum())
        ratio = float((rotated * after).sum()) / size if size else 0.0
        residual = float((after - ratio * rotated).norm() / after.norm().clamp_min(1e-30))
        found.append(RotationFit(variant=variant, ratio=ratio, error=residual))
        if residual <= limit:
            break
    return min(found, key=lambda fit: fit.error)


def correct_variant(rope: RopeConfig) -> RotationVariant:
    return RotationVariant(rope.rope_interleave, "config", "canonical")


def variants(rope: RopeConfig, offset: Callable[[], int]) -> Iterator[RotationVariant]:
    """The correct variant, then mistakes; `offset` computes the likeliest offset of positions."""
    yield correct_variant(rope)
    scaled = rope.rope_type != "default"
    for interleave in (rope.rope_interleave, not rope.rope_interleave):
        for frequencies in ("config", *(["unscaled"] if scaled else []), "none"):
            for order in ("canonical", "as_is", "twice"):
                variant = RotationVariant(interleave, frequencies, order)
                if variant != correct_variant(rope):
                    yield variant
    yield correct_variant(rope)._replace(offset=offset())


def nearest_offset(before: Tensor, after: Tensor, positions: Tensor, rope: RopeConfig) -> int:
    """The offset of all positions that explains the angles between the correct rotation of `before`
    and `after` best; among equals the smallest. Arguments as of `best_fit`.
    """
    rotated = rotate(before, positions, rope, correct_variant(rope)).double()
    own, seen = (torch.complex(*x.chunk(2, dim=-1)) for x in (rotated, after.double()))
    turned = (seen * own.conj()).flatten(0, -2).sum(dim=0)  # one angle per pair
    largest = max(LARGEST_OFFSET, int(positions.max()))
    offsets = torch.arange(-largest, largest + 1, dtype=torch.float64)
    offsets = offsets[offsets.abs().argsort(stable=True)]
    frequencies = _frequencies(rope, before.shape[-1], correct_variant(rope)).double()
    angles = offsets[:, None] * frequencies
    likeness = angles.cos() @ turned.real + angles.sin() @ turned.imag
    return int(offsets[int(likeness.argmax())])


def rotate(x: Tensor, positions: Tensor, rope: RopeConfig, variant: RotationVariant) -> Tensor:
    """`x` rotated by `variant`, with unscaled cos and sin."""
    at = (positions + variant.offset)[:, None].to(torch.float32)
    angles = at * _frequencies(rope, x.shape[-1], variant)
    cos, sin = (t.to(x.dtype)[:, None] for t in (angles.cos(), angles.sin()))
    real, imaginary = _pairs(x, variant.interleave)
    out = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    joined = torch.stack(out, dim=-1).flatten(-2) if variant.interleave else torch.cat(out, dim=-1)
    # Recorded channels are in canonical order according to the config's pairing.
    if variant.order == "canonical":
        return torch.cat(_pairs(joined, rope.rope_interleave), dim=-1)
    if variant.order == "as_is":
        return joined
    return torch.cat(_pairs(torch.cat(out, dim=-1), rope.rope_interleave), dim=-1)


def _pairs(x: Tensor, interleave: bool) -> tuple[Tensor, Tensor]:
    if interleave:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


_table = lru_cache(maxsize=64)(inverse_frequencies)


def _frequencies(rope: RopeConfig, dim: int, variant: RotationVariant) -> Tensor:
    if variant.frequencies == "none":
        return torch.zeros(dim // 2)
    plain = replace(rope, rope_type="default", pair_factors=None)
    return _table(plain if variant.frequencies == "unscaled" else rope, dim)


def cos_sin_scale(rope: RopeConfig) -> float:
    """Scale of cos and sin: m(mscale) / m(mscale_all_dim) for YaRN, 1 for others."""
    return cos_sin_scales(rope)[0][0]


def cos_sin_scales(rope: RopeConfig) -> list[tuple[float, str]]:
    """The correct scale of cos and sin, then wrong ones with causes, in order of precedence."""
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
        (bottom, "only m(mscale_all_dim) is applied"),
        (plain, "mscale and mscale_all_dim are ignored"),
        (proper * proper, "the factor is applied twice"),
    ]
