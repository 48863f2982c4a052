"""fp8-e4m3 weights with one fp32 scale per block (DeepSeek-V3 section 3.3): W = W_fp8 *
weight_scale_inv.

Blocks start at row and column 0 on a ceil grid; the last ones may be cut short by the matrix's
edge.
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


def quantize_blocks(
    weight: Float[Tensor, "out in"], block: tuple[int, int], scale_fmt: str | None = None
) -> tuple[Float[Tensor, "out in"], Float[Tensor, "out_blocks in_blocks"]]:
    """fp8 weights and the fp32 scales that bring each block's largest magnitude to 448.

    `scale_fmt` "ue8m0" rounds scales up to powers of two. Padding of cut blocks is zero, so it
    enters no maximum; an all-zero block gets scale 1.
    """
    rows, columns = weight.shape
    grid = (math.ceil(rows / block[0]), math.ceil(columns / block[1]))
    padded = torch.zeros(
        grid[0] * block[0], grid[1] * block[1], dtype=torch.float32, device=weight.device
    )
    padded[:rows, :columns] = weight
    # out x in -> out_blocks x rows x in_blocks x columns
    blocks = padded.view(grid[0], block[0], grid[1], block[1])
    scale = blocks.abs().amax(dim=(1, 3)) / FP8_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    if scale_fmt == "ue8m0":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    quantized = (blocks / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return quantized.view_as(padded)[:rows, :columns].contiguous(), scale
