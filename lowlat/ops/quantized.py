"""int8 and int4 weights: quantization, storage and dequantization (reference implementation).

32 columns of a row are a group (group size 32) and share fp16 numbers. int8 is symmetric; int4 is
asymmetric, with a minimum in place of an integer zero point. Values are rounded to nearest (RTN).
Scales are those below (min-max), or chosen on calibration activations (`weighted_quantization`).

    int8 (GGUF's Q8_0)  value = scale * q,            q in -127..127, scale = max |value| / 127
    int4 (GGUF's Q4_1)  value = scale * q + minimum,  q in 0..15, scale = (max - min) / 15

Dequantized values are quantized again without loss. Products are those of the values rounded to the
activations' dtype. Storage follows the order in which kernels read: tiles of 16 rows; in a tile its
groups, and in a group

    int8  weight [tiles, groups, 8, 16, 2, 2]: step s, row, parity p, byte b hold column
          4 s + 2 b + p as value + 128
    int4  weight [tiles, groups, 4, 16, 2, 2]: step s, row, parity p, byte b hold column
          8 s + 4 b + p in the low half and 8 s + 4 b + 2 + p in the high half
    weight_scale, weight_minimum [tiles, groups, 16] fp16

Rows and columns that fill the last tile and group hold q = 0, rows a scale (and minimum) of 0. Also
owns matrices of int8 rows with one scale each (per-channel), for MLA's up-projections, which
are read along both axes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float16, Float32, Int8, Shaped, UInt8
from torch import Tensor

TILE = 16
"""Rows of a tile."""
GROUP = 32
"""Columns that share a scale."""
INT8_SHAPE = (8, 16, 2, 2)
"""Shape of a group of a tile in int8."""
INT4_SHAPE = (4, 16, 2, 2)
"""Shape of a group of a tile in int4."""
INT8_MAX = 127
INT8_OFFSET = 128
"""Added to int8 values where they are stored."""
INT4_MAX = 15
Empty = Callable[..., Tensor]
"""An allocator with the signature of torch.empty."""
CHUNK_ELEMENTS = 2**15
"""Elements quantised at a time: intermediates stay in the cache, and torch splits no operation."""


class Int8Weight(NamedTuple):
    """A matrix in int8 groups."""

    weight: UInt8[Tensor, "tiles groups 8 16 2 2"]
    weight_scale: Float16[Tensor, "tiles groups 16"]


class Int4Weight(NamedTuple):
    """A matrix in int4 groups."""

    weight: UInt8[Tensor, "tiles groups 4 16 2 2"]
    weight_scale: Float16[Tensor, "tiles groups 16"]
    weight_minimum: Float16[Tensor, "tiles groups 16"]


class Int8Rows(NamedTuple):
    """A matrix in int8 with a scale per row."""

    weight: Int8[Tensor, "out in"]
    weight_scale: Float32[Tensor, " out"]


def num_tiles(rows: int) -> int:
    """Tiles that hold `rows`."""
    return -(-rows // TILE)


def num_groups(columns: int) -> int:
    """Groups that hold `columns`."""
    return -(-columns // GROUP)


def quantize_int8(dense: Float[Tensor, "out in"], empty: Empty = torch.empty) -> Int8Weight:
    """`dense` in int8 groups; scales are infinite or NaN for groups out of range."""
    return Int8Weight(*in_chunks(dense, _int8_chunk, empty))


def quantize_int4(dense: Float[Tensor, "out in"], empty: Empty = torch.empty) -> Int4Weight:
    """`dense` in int4 groups; scales or minima are infinite or NaN for groups out of range."""
    return Int4Weight(*in_chunks(dense, _int4_chunk, empty))


def quantize_rows(dense: Float[Tensor, "out in"], empty: Empty = torch.empty) -> Int8Rows:
    """`dense` in int8 with scale = max |value| / 127 of each row, NaN or infinite if the maximum
    is."""
    wide = dense.detach().to(torch.float32)
    scale = wide.abs().amax(dim=1) / INT8_MAX
    weight = empty(*dense.shape, dtype=torch.int8)
    return Int8Rows(weight.copy_((wide / divisor(scale)[:, None]).round()), scale)


def dequantize_int8(
    packed: Int8Weight, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "out in"]:
    """The matrix [rows, columns], multiplied in fp32 and rounded once to `dtype`."""
    values = int8_steps(packed.weight) * _wide(packed.weight_scale)
    return values.flatten(1)[:rows, :columns].to(dtype)


def dequantize_int4(
    packed: Int4Weight, rows: int, columns: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "out in"]:
    """The matrix [rows, columns], computed in fp32 and rounded once to `dtype`."""
    values = int4_steps(packed.weight) * _wide(packed.weight_scale)
    values = values + _wide(packed.weight_minimum)
    return values.flatten(1)[:rows, :columns].to(dtype)


def dequantize_rows(
    packed: Int8Rows, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "out in"]:
    """The matrix, multiplied in fp32 and rounded once to `dtype`."""
    return (packed.weight.to(torch.float32) * packed.weight_scale[:, None]).to(dtype)


def numbers_by_row(
    numbers: Float16[Tensor, "tiles groups 16"],
) -> Float16[Tensor, "padded_rows groups"]:
    """Scales or minima in the order of rows and groups."""
    return numbers.transpose(1, 2).flatten(0, 1)


def _wide(numbers: Float16[Tensor, "tiles groups 16"]) -> Float32[Tensor, "padded_rows groups 1"]:
    return numbers_by_row(numbers).to(torch.float32)[..., None]


def int8_steps(
    weight: UInt8[Tensor, "tiles groups 8 16 2 2"],
) -> Float32[Tensor, "padded_rows groups 32"]:
    """The q of int8 weights in the order of rows and columns."""
    # tiles x groups x steps x rows x parity x bytes
    # -> tiles x rows x groups x steps x bytes x parity
    ordered = weight.permute(0, 3, 1, 2, 5, 4)
    return ordered.flatten(3).flatten(0, 1).to(torch.float32) - INT8_OFFSET


def int4_steps(
    weight: UInt8[Tensor, "tiles groups 4 16 2 2"],
) -> Float32[Tensor, "padded_rows groups 32"]:
    """The q of int4 weights in the order of rows and columns."""
    halves = torch.stack([weight & 15, weight >> 4])
    # half x tiles x groups x steps x rows x parity x bytes
    # -> tiles x rows x groups x steps x bytes x half x parity
    ordered = halves.permute(1, 4, 2, 3, 6, 0, 5)
    return ordered.flatten(3).flatten(0, 1).to(torch.float32)


def in_chunks(
    dense: Float[Tensor, "out in"],
    quantize: Callable[[Float32[Tensor, "rows in"]], tuple[Shaped[Tensor, "..."], ...]],
    empty: Empty,
    elements: int = CHUNK_ELEMENTS,
) -> tuple[Shaped[Tensor, "..."], ...]:
    """Apply `quantize` to whole tiles of rows of about `elements`, in parallel, and concatenate."""
    dense = dense.detach()
    step = max(elements // dense.shape[1] // TILE, 1) * TILE

    def chunk(first: int) -> tuple[Tensor, ...]:
        # kernels read rows whose elements adjoin
        rows = dense[first : first + step].to(torch.float32).contiguous()
        return quantize(F.pad(rows, (0, 0, 0, -len(rows) % TILE)))

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        chunks = list(threads.map(chunk, range(0, len(dense), step)))

    def joined(parts: tuple[Tensor, ...]) -> Tensor:
        tiles = sum(map(len, parts))
        return torch.cat(parts, out=empty(tiles, *parts[0].shape[1:], dtype=parts[0].dtype))

    return tuple(map(joined, zip(*chunks, strict=True)))


def _int8_chunk(rows: Float32[Tensor, "padded_rows in"]) -> tuple[Tensor, Tensor]:
    groups = int8_groups(rows)
    return int8_tiles(groups, max_scale(groups).to(torch.float16))


def _int4_chunk(rows: Float32[Tensor, "padded_rows in"]) -> tuple[Tensor, Tensor, Tensor]:
    groups = int4_groups(rows)
    return int4_tiles(groups, *min_max_range(groups), rows.shape[1])


def int8_groups(rows: Float32[Tensor, "rows in"]) -> Float32[Tensor, "rows groups 32"]:
    """The groups of rows, the last of each filled up with zeros."""
    return F.pad(rows, (0, -rows.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def int4_groups(rows: Float32[Tensor, "rows in"]) -> Float32[Tensor, "rows groups 32"]:
    """The groups of rows, the last of each filled up with its last column, which changes no minimum
    and no maximum.
    """
    missing = -rows.shape[1] % GROUP
    filled = torch.cat([rows, rows[:, -1:].expand(-1, missing)], dim=1) if missing else rows
    return filled.unflatten(1, (-1, GROUP))


def max_scale(groups: Float32[Tensor, "*rows columns"]) -> Float32[Tensor, "*rows"]:
    """The int8 scale that reaches the largest magnitude."""
    low, high = groups.aminmax(dim=-1)
    return torch.maximum(high, -low) / INT8_MAX


def min_max_range(
    groups: Float32[Tensor, "*rows 32"],
) -> tuple[Float16[Tensor, "*rows"], Float16[Tensor, "*rows"]]:
    """The int4 scale and minimum that reach from the smallest to the largest value."""
    low, high = groups.aminmax(dim=-1)
    return ((high - low) / INT4_MAX).to(torch.float16), low.to(torch.float16)


def int8_values(
    groups: Float32[Tensor, "*rows columns"], scale: Float32[Tensor, "*rows"]
) -> Float32[Tensor, "*rows columns"]:
    """The q of int8 groups."""
    return (groups / divisor(scale)[..., None]).round_().clamp_(-INT8_MAX, INT8_MAX)


def int4_values(
    groups: Float32[Tensor, "*rows columns"],
    scale: Float32[Tensor, "*rows"],
    minimum: Float32[Tensor, "*rows"],
) -> Float32[Tensor, "*rows columns"]:
    """The q of int4 groups."""
    return ((groups - minimum[..., None]) / divisor(scale)[..., None]).round_().clamp_(0, INT4_MAX)


def int8_tiles(
    groups: Float32[Tensor, "padded_rows groups 32"], scale: Float16[Tensor, "padded_rows groups"]
) -> tuple[Tensor, Tensor]:
    """Groups rounded with these scales, in the order of `Int8Weight`."""
    q = int8_values(groups, scale.to(torch.float32)).add_(INT8_OFFSET).to(torch.uint8)
    # rows x groups x 32 -> tiles x groups x steps x rows x parity x bytes
    tiles = q.unflatten(0, (-1, TILE)).unflatten(-1, (-1, 2, 2)).permute(0, 2, 3, 1, 5, 4)
    return tiles.contiguous(), _scales_in_tiles(scale)


def int4_tiles(
    groups: Float32[Tensor, "padded_rows groups 32"],
    scale: Float16[Tensor, "padded_rows groups"],
    minimum: Float16[Tensor, "padded_rows groups"],
    columns: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups of rows of `columns`, rounded with these scales and minima, in the order of
    `Int4Weight`.
    """
    q = int4_values(groups, scale.to(torch.float32), minimum.to(torch.float32))
    q.flatten(1)[:, columns:] = 0
    return pack_int4(q, scale, minimum)


def pack_int4(
    values: Float32[Tensor, "padded_rows groups 32"],
    scale: Float16[Tensor, "padded_rows groups"],
    minimum: Float16[Tensor, "padded_rows groups"],
) -> tuple[Tensor, Tensor, Tensor]:
    """The q of rows, with their scales and minima, in the order of `Int4Weight`."""
    q = values.to(torch.uint8)
    # rows x groups x 32 -> half x tiles x groups x steps x rows x parity x bytes
    tiles = q.unflatten(0, (-1, TILE)).unflatten(-1, (4, 2, 2, 2))
    halves = tiles.permute(5, 0, 2, 3, 1, 6, 4)
    packed = (halves[0] | halves[1] << 4).contiguous()
    return packed, _scales_in_tiles(scale), _scales_in_tiles(minimum)


def _scales_in_tiles(
    scale: Float16[Tensor, "padded_rows groups"],
) -> Float16[Tensor, "tiles groups 16"]:
    return scale.unflatten(0, (-1, TILE)).transpose(1, 2).contiguous()


def divisor(scale: Float32[Tensor, "*rows"]) -> Float32[Tensor, "*rows"]:
    """What a group is divided by: its scale, or 1 for groups without a range, which hold zeros."""
    return torch.where(scale == 0, 1.0, scale)
