"""Native kernels of quantization, with the signatures of their reference implementations. `level`
selects another instruction-set level.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float16, Float32
from torch import Tensor

from lowlat.ops import native
from lowlat.ops.quantized import (
    GROUP,
    INT4_SHAPE,
    INT8_SHAPE,
    Empty,
    Int4Weight,
    Int8Weight,
    num_groups,
    num_tiles,
)


def quantize_int8(
    dense: Float[Tensor, "out in"], empty: Empty = torch.empty, *, level: str = ""
) -> Int8Weight:
    """Native kernel of lowlat.ops.quantized.quantize_int8; dense is bf16 or fp32."""
    rows, columns = dense.shape
    tiles, groups = num_tiles(rows), num_groups(columns)
    weight = empty(tiles, groups, *INT8_SHAPE, dtype=torch.uint8)
    packed = Int8Weight(weight, empty(tiles, groups, 16, dtype=torch.float16))
    module = native.module()
    module.pack(dense, module.Matrix.int8(*packed, rows=rows, columns=columns), level)
    return packed


def quantize_int4(
    dense: Float[Tensor, "out in"], empty: Empty = torch.empty, *, level: str = ""
) -> Int4Weight:
    """Native kernel of lowlat.ops.quantized.quantize_int4; dense is bf16 or fp32."""
    rows, columns = dense.shape
    tiles, groups = num_tiles(rows), num_groups(columns)
    weight = empty(tiles, groups, *INT4_SHAPE, dtype=torch.uint8)
    scale, minimum = empty(2, tiles, groups, 16, dtype=torch.float16)
    packed = Int4Weight(weight, scale, minimum)
    module = native.module()
    module.pack(dense, module.Matrix.int4(*packed, rows=rows, columns=columns), level)
    return packed


def int4_search(
    rows: Float32[Tensor, "padded_rows in"],
    importance: Float32[Tensor, " in"],
    shrinks: Sequence[float],
    refits: int,
    *,
    level: str = "",
) -> tuple[Float16[Tensor, "padded_rows groups"], Float16[Tensor, "padded_rows groups"]]:
    """Native kernel of lowlat.ops.weighted_quantization.int4_search, of whole rows in whole tiles.
    Runs on the calling thread, as the next two.
    """
    count, columns = rows.shape
    scale, minimum = torch.empty(2, count, num_groups(columns), dtype=torch.float16)
    native.module().search_int4(
        rows, importance.contiguous(), list(shrinks), refits, scale, minimum, level
    )
    return scale, minimum


def int8_search(
    rows: Float32[Tensor, "padded_rows in"],
    importance: Float32[Tensor, " in"],
    shrinks: Sequence[float],
    refits: int,
    *,
    level: str = "",
) -> Float16[Tensor, "padded_rows groups"]:
    """Native kernel of lowlat.ops.weighted_quantization.int8_search, of whole rows in whole
    tiles.
    """
    scale = torch.empty(len(rows), num_groups(rows.shape[1]), dtype=torch.float16)
    native.module().search_int8(rows, importance.contiguous(), list(shrinks), refits, scale, level)
    return scale


def feedback_block(
    rows: Float32[Tensor, "padded_rows block"],
    factor: Float32[Tensor, "block block"],
    shrinks: Sequence[float],
    refits: int,
    *,
    level: str = "",
) -> tuple[
    Float32[Tensor, "padded_rows groups 32"],
    Float16[Tensor, "padded_rows groups"],
    Float16[Tensor, "padded_rows groups"],
    Float32[Tensor, "padded_rows block"],
]:
    """Native kernel of lowlat.ops.calibrated_quantization.feedback_block; at most 128 columns."""
    count, columns = rows.shape
    groups = num_groups(columns)
    q, errors = torch.empty(count, groups, GROUP), torch.empty(count, columns)
    scale, minimum = torch.empty(2, count, groups, dtype=torch.float16)
    importance = factor.diagonal() ** -2
    native.module().feedback_int4(
        rows, importance, list(shrinks), refits, factor, scale, minimum, q, errors, level
    )
    return q, scale, minimum, errors
