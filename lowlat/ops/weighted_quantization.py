"""Search of int8 and int4 scales by activation-weighted error (importance matrix,
imatrix), in place of min-max ranges.

The error of a row's product with an input x is approximated by the diagonal of E[x x^T]:

    error = sum over columns of E[x^2] (dequantized - weight)^2

`importance` is E[x^2] per column. Each group starts from its min-max range and from shrunk ranges;
weighted least squares refits scale and minimum to the rounded values, and rounding to them follows.
The candidate of least error, measured after the scales are rounded to fp16, is used; min-max is one
of them, so the error is never larger than its. Candidates that leave the smallest or largest q of a
group unused are not taken: the min-max range of dequantized values is then the chosen range, so
they are quantized again without loss. Groups do not depend on one another: results are the same for
any number of threads.

The native kernels of `int4_search` and `int8_search` run where they are built. They sum in another
order, so a candidate of nearly the same error may win; their bits are the same at every level.
"""

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from lowlat.ops import native, native_kernels
from lowlat.ops.quantized import (
    GROUP,
    INT4_MAX,
    INT8_MAX,
    Empty,
    Int4Weight,
    Int8Rows,
    Int8Weight,
    in_chunks,
    int4_groups,
    int4_tiles,
    int4_values,
    int8_groups,
    int8_tiles,
    int8_values,
    max_scale,
    min_max_range,
)

LOW_SHRINKS = HIGH_SHRINKS = (0.0, 0.03, 0.06, 0.1)
"""Shares of an int4 range to cut off at its ends."""
INT8_SHRINKS = (1.0, 0.99, 0.98, 0.96, 0.94)
"""Factors on an int8 scale."""
REFITS = 2
"""Least squares fits per candidate."""
LEAST_IMPORTANCE = 1e-3
"""Smallest importance, relative to the mean: channels that are 0 in calibration text may not be 0
in other text.
"""


def quantize_int4_weighted(
    dense: Float[Tensor, "out in"],
    importance: Float32[Tensor, " in"],
    empty: Empty = torch.empty,
) -> Int4Weight:
    """`dense` in int4 groups of least weighted error; non-finite as `quantize_int4`."""
    chunk = partial(_int4_chunk, importance=_relative(importance))
    return Int4Weight(*in_chunks(dense, chunk, empty))


def quantize_int8_weighted(
    dense: Float[Tensor, "out in"],
    importance: Float32[Tensor, " in"],
    empty: Empty = torch.empty,
) -> Int8Weight:
    """`dense` in int8 groups of least weighted error; non-finite as `quantize_int8`."""
    chunk = partial(_int8_chunk, importance=_relative(importance))
    return Int8Weight(*in_chunks(dense, chunk, empty))


def quantize_rows_weighted(
    dense: Float[Tensor, "out in"],
    importance: Float32[Tensor, " in"],
    empty: Empty = torch.empty,
) -> Int8Rows:
    """`dense` in int8 rows of least weighted error; non-finite as `quantize_rows`."""
    wide = dense.detach().to(torch.float32)
    scale = int8_search(wide, _relative(importance), torch.float32)
    weight = empty(*dense.shape, dtype=torch.int8)
    return Int8Rows(weight.copy_(int8_values(wide, scale)), scale)


def _relative(importance: Float32[Tensor, " in"]) -> Float32[Tensor, " in"]:
    """Importance relative to its mean, and not below LEAST_IMPORTANCE."""
    mean = importance.mean()
    return (importance / torch.where(mean > 0, mean, 1.0)).clamp(min=LEAST_IMPORTANCE)


def _int4_chunk(
    rows: Float32[Tensor, "padded_rows in"], importance: Float32[Tensor, " in"]
) -> tuple[Tensor, Tensor, Tensor]:
    scale, minimum = find_int4_ranges(rows, importance)
    return int4_tiles(int4_groups(rows), scale, minimum, rows.shape[1])


def find_int4_ranges(
    rows: Float32[Tensor, "padded_rows in"], importance: Float32[Tensor, " in"]
) -> tuple[Float16[Tensor, "padded_rows groups"], Float16[Tensor, "padded_rows groups"]]:
    """Scales and minima of least weighted error of all groups, by the native kernel if there is
    one.
    """
    if native.available():
        return native_kernels.int4_search(rows, importance, LOW_SHRINKS, REFITS)
    return int4_search(int4_groups(rows), in_groups(importance))


def int4_search(
    groups: Float32[Tensor, "*rows 32"], weights: Float32[Tensor, "*broadcast 32"]
) -> tuple[Float16[Tensor, "*rows"], Float16[Tensor, "*rows"]]:
    """Scales and minima of least weighted error."""
    scale, minimum = min_max_range(groups)
    least = _error(groups, weights, _int4_dequantized(groups, scale, minimum))
    least, ends = _unless_overflown(least), torch.stack(groups.aminmax(dim=-1), dim=-1)
    for candidate in _int4_candidates(groups, weights):
        error = _error(groups, weights, _int4_dequantized(groups, *candidate))
        used = int4_values(ends, *(part.to(torch.float32) for part in candidate))
        is_better = (error < least) & (used[..., 0] == 0) & (used[..., 1] == INT4_MAX)
        least = torch.where(is_better, error, least)
        scale = torch.where(is_better, candidate[0], scale)
        minimum = torch.where(is_better, candidate[1], minimum)
    return scale, minimum


def _int4_candidates(groups: Tensor, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and minima in fp16: shrunk ranges, refitted."""
    low, high = groups.aminmax(dim=-1)
    extent = high - low
    for low_shrink in LOW_SHRINKS:
        for high_shrink in HIGH_SHRINKS:
            scale = extent * ((1 - low_shrink - high_shrink) / INT4_MAX)
            minimum = low + low_shrink * extent
            for _ in range(REFITS):
                q = int4_values(groups, scale, minimum)
                scale, minimum = _line(groups, weights, q)
            yield scale.to(torch.float16), minimum.to(torch.float16)


def _line(groups: Tensor, weights: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted least squares fit of scale * q + minimum; a scale of 0 for groups of one q."""
    total = weights.sum(-1)
    mean_q = (weights * q).sum(-1) / total
    mean = (weights * groups).sum(-1) / total
    centred = q - mean_q[..., None]
    weighted = weights * centred
    variance = (weighted * centred).sum(-1)
    covariance = (weighted * groups).sum(-1)
    scale = covariance / torch.where(variance > 0, variance, 1.0)
    return scale, mean - scale * mean_q


def _int4_dequantized(groups: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    wide_scale, wide_minimum = scale.to(torch.float32), minimum.to(torch.float32)
    q = int4_values(groups, wide_scale, wide_minimum)
    return q * wide_scale[..., None] + wide_minimum[..., None]


def _int8_chunk(
    rows: Float32[Tensor, "padded_rows in"], importance: Float32[Tensor, " in"]
) -> tuple[Tensor, Tensor]:
    groups = int8_groups(rows)
    if native.available():
        scale = native_kernels.int8_search(rows, importance, INT8_SHRINKS, REFITS)
    else:
        scale = int8_search(groups, in_groups(importance), torch.float16).to(torch.float16)
    return int8_tiles(groups, scale)


def int8_search(
    groups: Float32[Tensor, "*rows columns"],
    weights: Float32[Tensor, "*broadcast columns"],
    dtype: torch.dtype,
) -> Float32[Tensor, "*rows"]:
    """Scales of least weighted error that `dtype` can hold."""

    def error(scale: Tensor) -> Tensor:
        return _error(groups, weights, int8_values(groups, scale) * scale[..., None])

    largest = max_scale(groups)
    found = largest.to(dtype).to(torch.float32)
    least = _unless_overflown(error(found))
    for shrink in INT8_SHRINKS:
        scale = largest * shrink
        for _ in range(REFITS):
            q = int8_values(groups, scale)
            squares = (weights * q * q).sum(-1)
            scale = (weights * q * groups).sum(-1) / torch.where(squares > 0, squares, 1.0)
        scale = scale.to(dtype).to(torch.float32)
        own = error(scale)
        used = int8_values(largest[..., None] * INT8_MAX, scale)[..., 0]
        is_better = (own < least) & (used == INT8_MAX)
        least, found = torch.where(is_better, own, least), torch.where(is_better, scale, found)
    return found


def in_groups(importance: Float32[Tensor, " in"]) -> Float32[Tensor, "groups 32"]:
    """Importance by group; 0 for the columns that fill the last one."""
    missing = -len(importance) % GROUP
    return torch.nn.functional.pad(importance, (0, missing)).unflatten(0, (-1, GROUP))


def _error(groups: Tensor, weights: Tensor, dequantized: Tensor) -> Tensor:
    return ((dequantized - groups).square_() * weights).sum(-1)


def _unless_overflown(error: Tensor) -> Tensor:
    """Errors to improve; none is below that of a group out of range, which stays as min-max."""
    return torch.where(error.isfinite(), error, -torch.inf)
