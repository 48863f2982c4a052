"""Native kernels of quantization, with the signatures of their reference implementations. `level`
selects another instruction-set level.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.ops import native
from lowlat.ops.quantized import (
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
