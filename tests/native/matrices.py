"""A matrix in every storage the kernels know."""

import torch
from torch import Tensor

from lowlat.ops import native, quantized
from lowlat.ops.fp8 import quantize_blocks

from . import kernels


def int8_matrix(w: Tensor, occupied: Tensor | None = None) -> "kernels.Matrix":
    packed = quantized.quantize_int8(w)
    size = {"rows": w.shape[0], "columns": w.shape[1]}
    return native.module().Matrix.int8(*packed, **size, occupied=occupied)


def int4_matrix(w: Tensor, occupied: Tensor | None = None) -> "kernels.Matrix":
    packed = quantized.quantize_int4(w)
    size = {"rows": w.shape[0], "columns": w.shape[1]}
    return native.module().Matrix.int4(*packed, **size, occupied=occupied)


def int8_rows_matrix(w: Tensor, occupied: Tensor | None = None) -> "kernels.Matrix":
    return native.module().Matrix.int8_rows(*quantized.quantize_rows(w), occupied=occupied)


def fp8_rows_matrix(w: Tensor, occupied: Tensor | None = None) -> "kernels.Matrix":
    weight, scale = quantize_fp8_rows(w)
    module = native.module()
    return module.Matrix.fp8_rows(weight.view(torch.uint8), scale, occupied=occupied)


def quantize_fp8_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """fp8 values and a scale per row."""
    scale = w.float().abs().amax(dim=1) / 448 + 1e-30
    return (w.float() / scale[:, None]).to(torch.float8_e4m3fn), scale


def fp8_matrix(w: Tensor, occupied: Tensor | None = None) -> "kernels.Matrix":
    weight, scale = quantize_blocks(w.float(), (128, 128))
    return native.module().Matrix.fp8(weight.view(torch.uint8), scale, occupied=occupied)


def bf16_matrix(w: Tensor, occupied: Tensor | None = None) -> "kernels.Matrix":
    return native.module().Matrix.bf16(w, occupied=occupied)
