"""Linear layers trained in FP8 (DeepSeek-V3 section 3.3): what is quantised where, and the three
products.

All tensors are E4M3. Activations and gradients share an online scale per 128 channels of a row
along the axis that is summed over (1x128 tiles: per-token groups), weights per 128x128 block:

    fprop  y  = x W^T     x in tiles along in, W in blocks
    dgrad  dx = dy W      dy in tiles along out, the same blocks of W
    wgrad  dW = dy^T x    dy and the saved x in tiles along the tokens

Owns the definition and its emulation on any device; `fp8_scaled_mm` runs the products on GPUs that
have them. Quantisation itself is `fp8`'s.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lowlat.ops import fp8_scaled_mm
from lowlat.ops.fp8 import block_scales, in_blocks, quantize_grid
from lowlat.ops.norm import accumulation_dtype

TILE = 128
"""Channels that share a scale, and the length of a partial sum before it is promoted to fp32."""
ALONG_ROWS, ALONG_COLUMNS, SQUARE = (1, TILE), (TILE, 1), (TILE, TILE)
SHIFT = 2.0**8
"""Ratio of an E4M3 number to the fp16 number with the same bits in its fields."""
_FP16_FIELDS = 0xBF80 - 0x10000
"""Mask of the fp16 bits that an E4M3 number has, as int16: sign, 4 of exponent, 3 of mantissa."""
E5M6_MAX = (2 - 2.0**-6) * 2.0**15
E5M6_SMALLEST_NORMAL, E5M6_STEP = 2.0**-14, 2.0**-20

ScaleFormat = Literal["ue8m0"] | None
"""Scales of fp32, or of powers of two (rounded up)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Format:
    """Quantization formats of one linear layer."""

    weight_scales: ScaleFormat = None
    """Scale format of the weight's blocks: scale_fmt of exported checkpoints."""
    input_scales: ScaleFormat = None
    """Scale format of the input's tiles, along either axis."""
    gradient_scales: ScaleFormat = None
    """Scale format of the output gradient's tiles, along either axis."""
    saved_input: Literal["e4m3", "e5m6"] = "e4m3"
    """What the backward pass saves of the input: the tiles of the forward product, or a copy with
    three more bits.
    """


class Blocks(NamedTuple):
    """A matrix as scaled blocks, padded with zeros to full blocks."""

    values: Float[Tensor, "row_blocks block_rows column_blocks block_columns"]
    """fp8, or fp16 where they are E5M6."""
    scale: Float[Tensor, "row_blocks column_blocks"]
    shape: tuple[int, int]
    """Rows and columns without padding."""

    @property
    def transposed(self) -> "Blocks":
        """The transposed matrix, as views."""
        rows, columns = self.shape
        return Blocks(self.values.permute(2, 3, 0, 1), self.scale.T, (columns, rows))

    def dense(self, dtype: torch.dtype) -> Float[Tensor, "rows columns"]:
        """value * scale, rounded to `dtype`; exact in bf16 if scales are powers of two."""
        wide = torch.promote_types(dtype, torch.float32)
        scale = self.scale.to(wide)[:, None, :, None]
        if self.values.dtype == torch.float16:
            product = self.values.to(wide).mul_(scale)
        else:
            product = _shifted(self.values).to(wide).mul_(scale * SHIFT)
        matrix = product.flatten(2).flatten(0, 1)[: self.shape[0], : self.shape[1]]
        return matrix.to(dtype)


def _shifted(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """E4M3 values / SHIFT in fp16: the same bits in a wider field, several times faster than a
    conversion. NaN becomes a number, so a block with a NaN must have NaN as its scale.
    """
    bits = values.view(torch.int8).to(torch.int16)
    return bits.bitwise_left_shift_(7).bitwise_and_(_FP16_FIELDS).view(torch.float16)


def quantize(
    matrix: Float[Tensor, "rows columns"], block: tuple[int, int], scales: ScaleFormat = None
) -> Blocks:
    """E4M3 blocks of a matrix (section 3.3.2): largest magnitude of each / 448 as its scale, as in
    act_quant of DeepSeek's inference/kernel.py."""
    values, scale = quantize_grid(in_blocks(matrix, block), scales)
    return Blocks(values, scale, (matrix.shape[0], matrix.shape[1]))


def stored_blocks(
    weight: Float[Tensor, "out in"], scale: Float[Tensor, "out_blocks in_blocks"]
) -> Blocks:
    """A checkpoint's fp8 weight of 128x128 blocks and its weight_scale_inv."""
    rows, columns = weight.shape
    padding = (0, -columns % TILE, 0, -rows % TILE)
    # F.pad does not support fp8; byte 0 is the number 0.
    padded = F.pad(weight.view(torch.uint8), padding).view(weight.dtype)
    values = padded.view(scale.shape[0], TILE, scale.shape[1], TILE)
    broken = values.isnan().any(dim=3).any(dim=1)
    return Blocks(values, scale.masked_fill(broken, torch.nan), (rows, columns))


def quantize_e5m6(matrix: Float[Tensor, "rows columns"]) -> Blocks:
    """1x128 tiles with 5 exponent and 6 mantissa bits and power-of-two scales: the paper's format
    for saved inputs of the linears after attention. Stored in fp16.
    """
    blocks = in_blocks(matrix, ALONG_ROWS)
    scale = block_scales(blocks, E5M6_MAX, "ue8m0")
    scaled = blocks / scale[:, None, :, None]
    bits = scaled.view(torch.int32)
    # Round to nearest even on the 17 dropped bits: half a step less one, plus the last remaining
    # bit.
    rounded = (bits + 0xFFFF + ((bits >> 17) & 1)) & ~0x1FFFF
    small = (scaled / E5M6_STEP).round() * E5M6_STEP
    values = torch.where(scaled.abs() < E5M6_SMALLEST_NORMAL, small, rounded.view(torch.float32))
    values = torch.where(scaled.isfinite(), values, torch.nan)
    return Blocks(values.to(torch.float16), scale, (matrix.shape[0], matrix.shape[1]))


def product(
    a: Blocks, b: Blocks, dtype: torch.dtype, *, has_powers: bool = False
) -> Float[Tensor, "a_rows b_rows"]:
    """a b^T in `dtype`: E4M3 products are summed per 128 columns, then scaled and added in fp32.

    On devices without such products, the scales go into the fp32 operands of one product. Compared
    with the definition, this moves every term by at most two fp32 roundings and changes the order
    of sums, nothing else (measured in docs/numerics.md). With `has_powers` all scales are powers of
    two, so bf16 operands hold the values exactly.
    """
    if fp8_scaled_mm.is_available(a.values.device):
        rows, columns = a.shape[0], b.shape[0]
        return fp8_scaled_mm.product(a.values, a.scale, b.values, b.scale, dtype)[:rows, :columns]
    exact_in_bf16 = has_powers and dtype == torch.bfloat16
    wide = torch.bfloat16 if exact_in_bf16 else accumulation_dtype(dtype)
    return (a.dense(wide) @ b.dense(wide).T).to(dtype)


def blockwise_product(a: Blocks, b: Blocks) -> Float[Tensor, "a_rows b_rows"]:
    """Reference implementation of `product`: one partial sum of 128 at a time, in fp32."""
    rows_a, rows_b = (x.scale.repeat_interleave(x.values.shape[1], dim=0) for x in (a, b))
    parts_a, parts_b = (x.values.flatten(0, 1).unbind(1) for x in (a, b))
    total = torch.zeros(rows_a.shape[0], rows_b.shape[0], device=a.values.device)
    for k, (part_a, part_b) in enumerate(zip(parts_a, parts_b, strict=True)):
        partial = part_a.to(torch.float32) @ part_b.to(torch.float32).T
        total += partial * (rows_a[:, k, None] * rows_b[None, :, k])
    return total[: a.shape[0], : b.shape[0]]


def fp8_linear(
    x: Float[Tensor, "*rows in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None = None,
    fmt: Fp8Format = Fp8Format(),
) -> Float[Tensor, "*rows out"]:
    """x W^T + b with all three products in FP8; weight and bias are master weights (fp32).

    The result and the input's gradient have x's dtype; the weight's gradient is accumulated in fp32
    and has the weight's dtype. The backward pass saves fp8 tiles of x (`Fp8Format`) and the fp8
    blocks of the weight. A non-finite value makes its whole tile NaN.
    """
    if x.numel() == 0:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    out = _Fp8Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, fmt)
    assert isinstance(out, Tensor)
    return out.view(*x.shape[:-1], weight.shape[0])


def fp8_linear_quantized(
    x: Float[Tensor, "*rows in"],
    weight: Blocks,
    bias: Float[Tensor, "out"] | None = None,
    fmt: Fp8Format = Fp8Format(),
) -> Float[Tensor, "*rows out"]:
    """The forward product of `fp8_linear` with a weight that is stored in fp8."""
    tiles = quantize(x.reshape(-1, x.shape[-1]), ALONG_ROWS, fmt.input_scales)
    out = product(tiles, weight, x.dtype, has_powers=_forward_powers(fmt))
    out = out if bias is None else out + bias.to(x.dtype)
    return out.view(*x.shape[:-1], weight.shape[0])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fmt: Fp8Format) -> Tensor:
        tiles = quantize(x, ALONG_ROWS, fmt.input_scales)
        blocks = quantize(weight, SQUARE, fmt.weight_scales)
        out = product(tiles, blocks, x.dtype, has_powers=_forward_powers(fmt))
        saved = quantize_e5m6(x) if fmt.saved_input == "e5m6" else tiles
        ctx.save_for_backward(saved.values, saved.scale, blocks.values, blocks.scale)
        ctx.shapes, ctx.fmt = (saved.shape, blocks.shape), fmt
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        return out if bias is None else out + bias.to(x.dtype)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        values, scale, weight_values, weight_scale = ctx.saved_tensors
        saved = Blocks(values, scale, ctx.shapes[0])
        blocks = Blocks(weight_values, weight_scale, ctx.shapes[1])
        fmt, (weight_dtype, bias_dtype) = ctx.fmt, ctx.dtypes
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = input_gradient(grad, blocks, fmt) if needs_x else None
        grad_weight = weight_gradient(grad, saved, fmt, weight_dtype) if needs_weight else None
        wide = accumulation_dtype(grad.dtype)
        grad_bias = grad.to(wide).sum(dim=0).to(bias_dtype) if needs_bias else None
        return grad_x, grad_weight, grad_bias, None


def input_gradient(
    grad: Float[Tensor, "rows out"], weight: Blocks, fmt: Fp8Format
) -> Float[Tensor, "rows in"]:
    """dgrad: the gradient in tiles along out, the weight's blocks transposed."""
    tiles = quantize(grad, ALONG_ROWS, fmt.gradient_scales)
    has_powers = fmt.gradient_scales is not None and fmt.weight_scales is not None
    return product(tiles, weight.transposed, grad.dtype, has_powers=has_powers)


def weight_gradient(
    grad: Float[Tensor, "rows out"], saved: Blocks, fmt: Fp8Format, dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """wgrad: the gradient and the saved input, dequantized and quantized again, in tiles along the
    tokens.
    """
    wide = accumulation_dtype(grad.dtype)
    columns = quantize(grad, ALONG_COLUMNS, fmt.gradient_scales)
    inputs = quantize(saved.dense(torch.float32), ALONG_COLUMNS, fmt.input_scales)
    return product(columns.transposed, inputs.transposed, wide).to(dtype)


def _forward_powers(fmt: Fp8Format) -> bool:
    return fmt.input_scales is not None and fmt.weight_scales is not None
