"""fp8 weights with a scale per row or matrix, and MXFP4 weights (compressed-tensors and gpt-oss).

    fp8    weight e4m3 [out, in], weight_scale [out], [out, 1], [1] or []
    MXFP4  weight_packed uint8 [out, in / 2], weight_scale uint8 [out, in / 32]
           weight_blocks uint8 [out, in / 32, 16], weight_scales uint8 [out, in / 32]

A byte of MXFP4 holds two adjacent columns in e2m1, the first in the low half; a scale is the
exponent of a power of two in e8m0 (OCP Microscaling Formats). gpt-oss stacks a layer's experts:
experts.gate_up_proj_blocks [experts, 2 inner, ...], here with the gates' rows first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from gguf import GGMLQuantizationType
from jaxtyping import Float, UInt8
from torch import Tensor

from lowlat.checkpoint.tensor_source import Blocks, Quantized, ScaledRows, TensorSource
from lowlat.checkpoint.vendors.parts import (
    SCALE_DTYPES,
    VendorWeight,
    check_finite,
    check_part,
    matrix_shape,
)
from lowlat.ops.fp8 import dequantize_fp8_rows
from lowlat.ops.gguf_blocks import dequantize_blocks
from lowlat.ops.int4_blocks import halves_apart
from lowlat.utils.errors import UserError

MXFP4 = int(GGMLQuantizationType.MXFP4)
MXFP4_COLUMNS = 32
NAN_SCALE = 255
"""e8m0 of NaN."""


@final
@dataclass(frozen=True, slots=True)
class _FP8Rows(VendorWeight):
    def dequantize(self, start: int, stop: int) -> Float[Tensor, "rows columns"]:
        values = self.source.rows(self.parts[0], start, stop)
        return dequantize_fp8_rows(values, self._scale()[start:stop], torch.float32)

    def quantized(self) -> Quantized:
        return ScaledRows(lambda: self.source.read(self.parts[0]), self._scale)

    def _scale(self) -> Float[Tensor, "rows"]:
        name = self.parts[1]
        scale = check_finite(self.source.read(name).float(), self.source.where(name))
        return scale.flatten().expand(self.shape[0]).contiguous()


def fp8_rows(source: TensorSource, module: str, scale: str) -> VendorWeight:
    """The weight of `module` and its scales. Raises UserError naming a malformed tensor."""
    weight = f"{module}.weight"
    rows, columns = matrix_shape(source, weight)
    check_part(source, scale, SCALE_DTYPES, (rows, 1), (rows,), (1,), (1, 1), ())
    return _FP8Rows((rows, columns), torch.float32, source, (weight, scale))


@final
@dataclass(frozen=True, slots=True)
class _MXFP4(VendorWeight):
    place: tuple[int, int] | None
    """Expert and first row, of stacked experts."""

    def dequantize(self, start: int, stop: int) -> Float[Tensor, "rows columns"]:
        return dequantize_blocks(self._encode(start, stop), MXFP4)

    def quantized(self) -> Quantized:
        return (Blocks(MXFP4, self._blocks, in_file=False),)

    def _blocks(self) -> UInt8[Tensor, "rows row_bytes"]:
        return torch.cat([self._encode(start, stop) for start, stop in self.chunks()])

    def _encode(self, start: int, stop: int) -> UInt8[Tensor, "rows row_bytes"]:
        """Rows in the blocks of GGUF, whose bytes hold columns c and c + 16."""
        values, scales = (self._part(name, start, stop) for name in self.parts)
        scales = scales.view(torch.uint8)
        if bool((scales == NAN_SCALE).any()):
            raise UserError(
                f"{self.source.where(self.parts[1])} holds scales that are not finite; the "
                "checkpoint is damaged"
            )
        codes = halves_apart(values.reshape(stop - start, -1, 16))
        return torch.cat([scales[..., None], codes], dim=-1).flatten(1)

    def _part(self, name: str, start: int, stop: int) -> Tensor:
        if self.place is None:
            return self.source.rows(name, start, stop)
        expert, first = self.place
        return self.source.read(name)[expert, first + start : first + stop]


def packed_mxfp4(source: TensorSource, module: str) -> VendorWeight:
    """The weight of `module` of compressed-tensors. Raises UserError naming a malformed tensor."""
    packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
    rows, half = matrix_shape(source, packed)
    columns = 2 * half
    _check_columns(source, packed, columns)
    check_part(source, packed, (torch.uint8,), (rows, half))
    check_part(source, scale, _E8M0, (rows, columns // MXFP4_COLUMNS))
    return _MXFP4((rows, columns), torch.float32, source, (packed, scale), None)


def mxfp4_blocks(source: TensorSource, blocks: str) -> Iterator[tuple[str, VendorWeight]]:
    """The matrices that NAME_blocks and NAME_scales hold, by name: one, or those of all experts.
    Raises UserError naming a malformed tensor.
    """
    name = blocks.removesuffix("_blocks")
    parts = (blocks, f"{name}_scales")
    shape = source.shape(blocks)
    if len(shape) not in (3, 4) or shape[-1] != 16:
        raise UserError(
            f"{source.where(blocks)} has shape {list(shape)}, but MXFP4 blocks are [..., rows, "
            "columns / 32, 16]; download the model again"
        )
    check_part(source, blocks, (torch.uint8,), shape)
    check_part(source, parts[1], _E8M0, shape[:-1])
    rows, columns = shape[-3], shape[-2] * MXFP4_COLUMNS

    def matrix(size: int, place: tuple[int, int] | None) -> VendorWeight:
        return _MXFP4((size, columns), torch.float32, source, parts, place)

    if len(shape) == 3:
        yield name, matrix(rows, None)
        return
    prefix, _, projection = name.rpartition(".")
    halves = {"gate_up_proj": ("gate_proj", "up_proj")}.get(projection, (projection,))
    if rows % len(halves):
        raise UserError(f"{source.where(blocks)} has {rows} rows, which are not two equal halves")
    size = rows // len(halves)
    for expert in range(shape[0]):
        for number, half in enumerate(halves):
            yield f"{prefix}.{expert}.{half}.weight", matrix(size, (expert, number * size))


_E8M0 = (torch.uint8, torch.float8_e8m0fnu)


def _check_columns(source: TensorSource, name: str, columns: int) -> None:
    if columns % MXFP4_COLUMNS:
        raise UserError(
            f"{source.where(name)} has {columns} columns, which are not whole groups of "
            f"{MXFP4_COLUMNS}; such weights are not supported"
        )
