"""Native kernels of quantization and sampling, with the signatures of their reference
implementations. `level` selects another instruction-set level.
"""

import torch
from jaxtyping import Float, Float32
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


def draw(
    logits: Float32[Tensor, " vocab"],
    number: float,
    *,
    temperature: int | float,
    top_k: int = 0,
    top_p: int | float = 1.0,
    min_p: int | float = 0.0,
    level: str = "",
) -> int:
    """Native kernel of lowlat.ops.sampling.draw; every level gives the same token."""
    return native.module().draw(
        logits.detach().contiguous(),
        number,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        level=level,
    )
