"""RoPE config of a converted model: one wide shared key equivalent to several narrow keys.

Encodes arbitrary frequencies as longrope factors, and the softmax scale as mscale_all_dim.
"""

import math

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from lowlat.config.model import RopeConfig, yarn_mscale

BASE = 1.0
"""rope_theta of a converted model: 1 ** x is 1, so only the longrope factors set frequencies."""

SCALE_FACTOR = 2.0
"""`factor` of a converted model; only mscale_all_dim uses it."""


def half_order(rope: RopeConfig, head_dim: int) -> Int64[Tensor, " channels"]:
    """Order that puts a head's channels in half layout, where pair i is (i, i + head_dim / 2)."""
    order = torch.arange(head_dim)
    return order.view(-1, 2).T.flatten() if rope.rope_interleave else order


def wide_rope(
    frequencies: Float32[Tensor, " pairs"], attention_factor: float, groups: int, context: int
) -> RopeConfig:
    """RoPE of a shared key that holds `groups` keys with `frequencies` (radians per position).

    Pairs are ordered group by group, half layout. attention_factor: multiplies cos and sin.
    context: the longest context, below which longrope does not switch factors.
    """
    return RopeConfig(
        rope_theta=BASE,
        rope_type="longrope",
        rope_interleave=False,
        factor=SCALE_FACTOR,
        original_max_position_embeddings=context,
        mscale_all_dim=scale_exponent(groups, 2 * len(frequencies)),
        attention_factor=attention_factor,
        pair_factors=tuple(divisors(frequencies).tolist()) * groups,
    )


def divisors(frequencies: Float32[Tensor, " pairs"]) -> Float32[Tensor, " pairs"]:
    """fp32 numbers whose fp32 reciprocals are `frequencies`, bitwise if such numbers exist.

    They exist for frequencies computed as 1 / x. Other frequencies (scaled or blended after the
    reciprocal) may have an error of one unit in the last place.
    """
    best = (1.0 / frequencies.double()).float()
    for direction in (math.inf, -math.inf):
        candidate = torch.nextafter(best, torch.full_like(best, direction))
        closer = (1.0 / candidate - frequencies).abs() < (1.0 / best - frequencies).abs()
        best = torch.where(closer, candidate, best)
    return best


def scale_exponent(groups: int, head_dim: int) -> float:
    """mscale_all_dim for softmax scale head_dim ** -0.5 in heads of groups * head_dim channels.

    The scale is width ** -0.5 * m ** 2 with m = 0.1 * mscale_all_dim * ln(factor) + 1, so m must be
    groups ** 0.25. Returns the double whose scale is nearest.
    """
    if groups == 1:
        return 0.0
    start = 10.0 * (groups**0.25 - 1.0) / math.log(SCALE_FACTOR)

    def error(exponent: float) -> float:
        mscale = yarn_mscale(SCALE_FACTOR, exponent)
        return abs((groups * head_dim) ** -0.5 * mscale * mscale - head_dim**-0.5)

    return min((start + step * math.ulp(start) for step in range(-8, 9)), key=error)


def channel_order(groups: int, head_dim: int) -> Int64[Tensor, "groups head_dim"]:
    """Channel of the shared key for channel c of group g: real parts, then imaginary parts.

    A head of head_dim channels has its pairs at (i, i + head_dim / 2); the shared key of
    groups * head_dim channels at (j, j + groups * head_dim / 2) with j = g * head_dim / 2 + i.
    """
    pairs = head_dim // 2
    order = torch.arange(groups * head_dim).view(2, groups, pairs)
    return order.transpose(0, 1).reshape(groups, head_dim)
