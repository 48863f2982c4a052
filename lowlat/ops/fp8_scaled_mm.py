"""FP8 block products on GPU tensor cores (torch.nn.functional.scaled_mm): supported devices, and
the layouts cuBLAS requires. The reference implementation is `fp8_training.blockwise_product`.
"""

from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ROW_MULTIPLE = 16
"""cuBLAS takes fp8 matrices whose sides are multiples of this."""
SCALE_MULTIPLE = 4
"""Scales of 128x128 blocks are in columns padded to multiples of this."""
FIRST_CUDA = (12, 9)
"""The first CUDA whose cuBLAS has scales per block of 128."""
HOPPER = (9, 0)


def is_available(device: torch.device) -> bool:
    """Whether `device` multiplies 1x128 and 128x128 blocks with fp32 scales: Hopper only."""
    return device.type == "cuda" and _has_blocks(device.index or 0)


@cache
def _has_blocks(index: int) -> bool:
    version = torch.version.cuda
    if version is None:
        return False
    major, minor = (int(part) for part in version.split(".")[:2])
    return (major, minor) >= FIRST_CUDA and torch.cuda.get_device_capability(index) == HOPPER


def product(
    a: Float[Tensor, "a_blocks a_rows k_blocks k"],
    a_scale: Float[Tensor, "a_blocks k_blocks"],
    b: Float[Tensor, "b_blocks b_rows k_blocks k"],
    b_scale: Float[Tensor, "b_blocks k_blocks"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """a b^T, padded rows included. `a` is in 1x128 tiles, `b` in those or in 128x128 blocks."""
    left, right = _matrix(a), _matrix(b)
    is_square = b.shape[1] > 1
    right_scale = _block_scale(b_scale) if is_square else _tile_scale(b_scale, right.shape[0])
    kind = F.ScalingType
    # For fp64 inputs the widest accumulation available.
    out_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    out = F.scaled_mm(
        left,
        right.T,
        _tile_scale(a_scale, left.shape[0]),
        kind.BlockWise1x128,
        right_scale,
        kind.BlockWise128x128 if is_square else kind.BlockWise1x128,
        output_dtype=out_dtype,
    )
    return out.to(dtype)


def _matrix(
    blocks: Float[Tensor, "blocks block_rows k_blocks k"],
) -> Float[Tensor, "rows columns"]:
    """Row-major, padded with zero rows to the multiple."""
    matrix = blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)
    missing = -matrix.shape[0] % ROW_MULTIPLE
    if not missing:
        return matrix.contiguous()
    # fp8 supports few operations; bytes support all, and byte 0 is the number 0.
    return F.pad(matrix.view(torch.uint8), (0, 0, 0, missing)).view(matrix.dtype)


def _tile_scale(
    scale: Float[Tensor, "tiles k_blocks"], rows: int
) -> Float[Tensor, "rows k_blocks"]:
    """[rows, k_blocks] in column-major order."""
    return F.pad(scale, (0, 0, 0, rows - scale.shape[0])).T.contiguous().T


def _block_scale(
    scale: Float[Tensor, "b_blocks k_blocks"],
) -> Float[Tensor, "padded_blocks b_blocks"]:
    """[k_blocks padded to SCALE_MULTIPLE, b_blocks] in column-major order."""
    return F.pad(scale, (0, -scale.shape[1] % SCALE_MULTIPLE)).contiguous().T
