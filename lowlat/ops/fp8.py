"""fp8-e4m3 weights with one fp32 scale per block, block-wise quantization (DeepSeek-V3
section 3.3): W = W_fp8 * weight_scale_inv.

Blocks start at row and column 0 on a ceil grid; the last ones may be smaller.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

FP8_MAX = 448.0


def dequantize_blocks(
    weight: Float[Tensor, "out in"],
    scale_inv: Float[Tensor, "out_blocks in_blocks"],
    block: tuple[int, int],
    dtype: torch.dtype,
) -> Float[Tensor, "out in"]:
    """The matrix W_fp8 * scale_inv, multiplied in fp32 and rounded once to `dtype`."""
    rows, columns = weight.shape
    scale = scale_inv.repeat_interleave(block[0], dim=0)[:rows]
    scale = scale.repeat_interleave(block[1], dim=1)[:, :columns]
    return (weight.to(torch.float32) * scale).to(dtype)


def dequantize_fp8_rows(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "out"], dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """The matrix of fp8 values times one scale per row, multiplied in fp32 and rounded once."""
    return (weight.to(torch.float32) * scale[:, None]).to(dtype)


def quantize_blocks(
    weight: Float[Tensor, "out in"], block: tuple[int, int], scale_fmt: str | None = None
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out_blocks in_blocks"]]:
    """fp8 weights, and the fp32 scales that map each block's largest magnitude to 448.

    `scale_fmt` "ue8m0" rounds scales up to powers of two. The padding of partial blocks is zero and
    does not affect the maximum; an all-zero block gets scale 1. A block with a non-finite value
    becomes all NaN.
    """
    rows, columns = weight.shape
    blocks, scale = quantize_grid(in_blocks(weight, block), scale_fmt)
    return blocks.flatten(2).flatten(0, 1)[:rows, :columns].contiguous(), scale


def in_blocks(
    matrix: Float[Tensor, "rows columns"], block: tuple[int, int]
) -> Float[Tensor, "row_blocks block_rows column_blocks block_columns"]:
    """The matrix in fp32 as blocks, padded with zeros."""
    rows, columns = matrix.shape
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    size = (grid[0] * block[0], grid[1] * block[1])
    if size == (rows, columns):
        padded = matrix.to(torch.float32)
    else:
        padded = torch.zeros(size, dtype=torch.float32, device=matrix.device)
        padded[:rows, :columns] = matrix
    return padded.reshape(grid[0], block[0], grid[1], block[1])


def block_scales(
    blocks: Float[Tensor, "row_blocks block_rows column_blocks block_columns"],
    largest: float,
    scale_fmt: str | None,
) -> Float[Tensor, "row_blocks column_blocks"]:
    """Scales that map each block's largest magnitude to `largest` ("ue8m0": to at most that).

    1 for blocks of zeros, NaN for blocks with a non-finite value.
    """
    extremes = blocks.amax(dim=(1, 3)), -blocks.amin(dim=(1, 3))
    scale = torch.maximum(*extremes) / largest
    # Below the smallest normal number a quotient by the scale would be inexact or infinite.
    scale = torch.where(scale == 0, 1.0, scale).clamp_min(torch.finfo(torch.float32).tiny)
    if scale_fmt == "ue8m0":
        mantissa, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.where(mantissa > 0.5, 1.0, 0.5), exponent)
        scale = torch.where(scale.isfinite(), power, scale)
    return torch.where(scale.isfinite(), scale, torch.nan)


def quantize_grid(
    blocks: Float[Tensor, "row_blocks block_rows column_blocks block_columns"],
    scale_fmt: str | None = None,
) -> tuple[
    Float[Tensor, "row_blocks block_rows column_blocks block_columns"],
    Float[Tensor, "row_blocks column_blocks"],
]:
    """fp8 blocks and their scales, by the rules of `quantize_blocks`."""
    scale = block_scales(blocks, FP8_MAX, scale_fmt)
    # A quotient exceeds 448 at most by a rounding error, which rounding to fp8 removes.
    return (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn), scale
