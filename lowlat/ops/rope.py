"""Rotary position embedding: frequencies with their context-extension rules, tables, and the
rotation in interleaved or half-split (rotate_half, NeoX) layout.

Frequencies and angles are computed in fp32 with the operation order of Hugging Face transformers,
so that both agree to the bit at any position; docs/numerics.md explains why that matters beyond
position 10,000.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import RopeConfig, yarn_mscale
from lowlat.ops import autograd, native_training_kernels
from lowlat.ops.norm import accumulation_dtype


def inverse_frequencies(rope: RopeConfig, dim: int) -> Float[Tensor, "pairs"]:
    """Radians per position of each of the dim/2 pairs, fp32 on CPU, after the scaling rule of
    `rope.rope_type`.
    """
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    period = rope.rope_theta**exponent
    match rope.rope_type:
        case "default":
            return 1.0 / period
        case "linear":
            return (1.0 / period) / rope.factor
        case "llama3":
            return _llama3(1.0 / period, rope)
        case "yarn":
            return _yarn(period, rope, dim)
        case "longrope":
            return 1.0 / (
                torch.tensor(rope.pair_factors, dtype=torch.float32, device="cpu") * period
            )


def _llama3(inverse: Float[Tensor, "pairs"], rope: RopeConfig) -> Float[Tensor, "pairs"]:
    """Llama 3.1: long wavelengths divided by factor, short ones unchanged, a linear blend
    between."""
    assert rope.original_max_position_embeddings and rope.low_freq_factor and rope.high_freq_factor
    context, low, high = (
        rope.original_max_position_embeddings,
        rope.low_freq_factor,
        rope.high_freq_factor,
    )
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / rope.factor + smooth * inverse
    scaled = torch.where(wavelength > context / low, inverse / rope.factor, blended)
    return torch.where(wavelength < context / high, inverse, scaled)


def _yarn(period: Float[Tensor, "pairs"], rope: RopeConfig, dim: int) -> Float[Tensor, "pairs"]:
    """YaRN (arXiv 2309.00071 section 3.2, NTK-by-parts): interpolate slow pairs, keep fast ones,
    a linear ramp between.
    """
    low, high = _yarn_ramp(rope, dim)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return (1.0 / (rope.factor * period)) * (1 - kept) + (1.0 / period) * kept


def _yarn_ramp(rope: RopeConfig, dim: int) -> tuple[float, float]:
    """First and last pair of the ramp."""
    context = rope.original_max_position_embeddings
    assert context is not None

    def pair(rotations: float) -> float:
        turns = context / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = float(max(low, 0)), float(min(high, dim - 1))
    return low, high + 0.001 if low == high else high


def rotation_magnitude(rope: RopeConfig) -> float:
    """Factor on cos and sin. YaRN: m(mscale) / m(mscale_all_dim), 1 for DeepSeek-V3; explicit if
    attention_factor.
    """
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type != "yarn":
        return 1.0
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


class RotaryTable(NamedTuple):
    """cos and sin of the rotation angles of some tokens, fp32, times the rotation magnitude."""

    cos: Float[Tensor, "tokens pairs"]
    sin: Float[Tensor, "tokens pairs"]
    query_scale: Float[Tensor, "tokens"] | None = None
    """Factor on the queries of each token (`query_scale`); None: 1."""


class RotaryEmbedding:
    """cos and sin of the angles of any positions, made on demand from the stored frequencies."""

    def __init__(self, rope: RopeConfig, dim: int) -> None:
        self.inverse = inverse_frequencies(rope, dim)
        self.magnitude = rotation_magnitude(rope)

    def __call__(self, positions: Int[Tensor, "tokens"]) -> RotaryTable:
        """fp32 cos and sin, scaled by the rotation magnitude."""
        return rotary_table(positions, self.inverse, self.magnitude)


def rotary_table(
    positions: Int[Tensor, "tokens"],
    inverse: Float[Tensor, "pairs"],
    magnitude: float | Float[Tensor, "pairs"],
) -> RotaryTable:
    """fp32 cos and sin of all angles, times the magnitude (one for all pairs, or one per pair)."""
    angles = positions[:, None].to(torch.float32) * inverse.to(positions.device)
    return RotaryTable(angles.cos() * magnitude, angles.sin() * magnitude)


def query_scale(
    positions: Int[Tensor, "tokens"], beta: float, original: int
) -> Float[Tensor, "tokens"]:
    """Mistral 4's factor on queries, fp32: 1 + beta ln(1 + floor(position / original)), so that
    attention stays sharp beyond the context of pretraining.
    """
    return 1 + beta * torch.log(1 + torch.floor(positions / original))


def scale_queries(q: Float[Tensor, "tokens dim"], rope: RotaryTable) -> Float[Tensor, "tokens dim"]:
    """`q` times the factor of its token."""
    if rope.query_scale is None:
        return q
    wide = accumulation_dtype(q.dtype)
    return (q.to(wide) * rope.query_scale[:, None]).to(q.dtype)


def apply_rope(
    x: Float[Tensor, "tokens heads dim"],
    rope: RotaryTable,
    *,
    interleave: bool,
) -> Float[Tensor, "tokens heads dim"]:
    """Rotary position embedding (RoFormer, arXiv 2104.09864): rotate the pairs of every head,
    channels (2i, 2i+1) if `interleave`, else (i, i + dim/2), as rotate_half in transformers.

    The order of channels does not change, so a checkpoint's weights need no permutation. Computed
    in fp32, rounded once. The native kernel gives the same bits.
    """
    cos, sin = rope.cos, rope.sin
    if (
        native_training_kernels.usable(x)
        and native_training_kernels.usable(cos, sin)
        and x.stride(-1) == 1
    ):
        return autograd.rotate(x, cos, sin, interleave=interleave)
    wide = x.to(accumulation_dtype(x.dtype))
    cos, sin = cos[:, None], sin[:, None]
    if interleave:
        real, imaginary = wide[..., 0::2], wide[..., 1::2]
    else:
        real, imaginary = wide.chunk(2, dim=-1)
    rotated = (real * cos - imaginary * sin, real * sin + imaginary * cos)
    joined = torch.stack(rotated, dim=-1).flatten(-2) if interleave else torch.cat(rotated, dim=-1)
    return joined.to(x.dtype)
