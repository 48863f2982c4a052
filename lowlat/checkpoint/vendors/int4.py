"""int4 weights of compressed-tensors (pack-quantized), AWQ (gemm) and GPTQ (v1 and v2) files.

    weight = scale * (code - zero)

All pack eight 4-bit codes into an int32, code i of a word in bits 4 i to 4 i + 3:

                   codes                 zero points               scales
    pack-quantized weight_packed         weight_zero_point         weight_scale
                   [out, in / 8]         [out / 8, groups]         [out, groups]
    GPTQ           qweight [in / 8, out] qzeros [groups, out / 8]  scales [groups, out]
    AWQ            qweight [in, out / 8] qzeros [groups, out / 8]  scales [groups, out]

Symmetric weights have no zero points: zero is 8. AWQ orders the columns of a word 0, 2, 4, 6, 1, 3,
5, 7. GPTQ v1 stores zero points minus 1, v2 unchanged. GPTQ's g_idx [in] is the group of every
column.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lowlat.checkpoint.tensor_source import Blocks, Quantized, TensorSource
from lowlat.checkpoint.vendors.parts import (
    SCALE_DTYPES,
    VendorWeight,
    check_finite,
    check_part,
    matrix_shape,
)
from lowlat.config.hf.vendor_quantization import GROUP_STEP, Scheme
from lowlat.ops.gguf_blocks import row_bytes
from lowlat.ops.int4_blocks import (
    INT4_BF16,
    MAX_ZERO,
    Q4_0,
    SIZES,
    SYMMETRIC_ZERO,
    encode_int4,
    fits_a_word,
    int4_type,
)
from lowlat.utils.errors import UserError

WORD = 8
"""Codes of an int32."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Column of code i of a word."""


def int4_weight(source: TensorSource, module: str, scheme: Scheme) -> VendorWeight:
    """The weight of `module`. Raises UserError naming a tensor that is missing or malformed."""
    if scheme.layout == "pack-quantized":
        return _pack_quantized(source, module, scheme)
    return _gptq(source, module, scheme)


@dataclass(frozen=True, slots=True)
class _Int4(VendorWeight):
    group: int
    """Columns of a group."""
    scale: str
    """Name of the scales."""
    zero: str | None
    """Name of the zero points."""

    @abstractmethod
    def pairs(self, start: int, stop: int) -> UInt8[Tensor, "rows half_columns"]:
        """Codes of rows [start, stop), two adjacent columns per byte, the first in the low half."""

    @abstractmethod
    def scales(self, start: int, stop: int) -> Float[Tensor, "rows groups"]:
        """Scales of rows [start, stop) in the file's dtype."""

    @abstractmethod
    def zeros(self, start: int, stop: int) -> UInt8[Tensor, "rows groups"] | None:
        """Zero points of rows [start, stop), None if all are 8."""

    def group_index(self) -> Int[Tensor, "columns"] | None:
        """The group of every column, None if groups are consecutive columns."""
        return None

    def dequantize(self, start: int, stop: int) -> Float[Tensor, "rows columns"]:
        zero, index = self.zeros(start, stop), self.group_index()
        if index is None:
            index = torch.arange(self.shape[1]) // self.group
        scale = check_finite(self.scales(start, stop).float(), self.source.where(self.scale))
        pairs = self.pairs(start, stop)
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).float()
        codes -= SYMMETRIC_ZERO if zero is None else zero.float()[:, index]
        return codes.mul_(scale[:, index])

    def quantized(self) -> Quantized:
        return (Blocks(self._kind(), self._blocks, in_file=False),)

    def _kind(self) -> int:
        dtype = self.source.dtype(self.scale)
        return int4_type(self.shape[1], self.group, dtype, has_zeros=self.zero is not None)

    def _blocks(self) -> UInt8[Tensor, "rows row_bytes"]:
        """The matrix in blocks. Raises UserError for columns in activation order."""
        kind = self._kind()
        if self.group_index() is not None:
            raise UserError(
                f"{self.source.where(self.parts[-1])}: columns in activation order (act-order, "
                "desc_act) are only dequantized; use --dtype fp32, int8 or int4, or quantize the "
                "model without it"
            )
        width, _ = SIZES[kind]
        times, where = self.group // width, self.source.where(self.scale)
        result = torch.empty(self.shape[0], row_bytes(kind, self.shape[1]), dtype=torch.uint8)
        for start, stop in self.chunks():
            scale, zero = check_finite(self.scales(start, stop), where), self.zeros(start, stop)
            if kind not in (INT4_BF16, Q4_0) and not fits_a_word(scale):
                raise UserError(
                    f"{where} has fp32 scales with more than 16 significant bits, which are only "
                    "dequantized; use --dtype fp32, int8 or int4"
                )
            result[start:stop] = encode_int4(
                kind,
                self.pairs(start, stop),
                scale.repeat_interleave(times, dim=1),
                None if zero is None else zero.repeat_interleave(times, dim=1),
            )
        return result


# --- compressed-tensors -------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _PackQuantized(_Int4):
    def pairs(self, start: int, stop: int) -> UInt8[Tensor, "rows half_columns"]:
        packed, _, size, *_ = self.parts
        found = tuple(self.source.read(size).tolist())
        if found != self.shape:
            raise UserError(
                f"{self.source.where(size)} is {list(found)}, but the packed weight has "
                f"{list(self.shape)}; the checkpoint is damaged, download it again"
            )
        return self.source.read(packed)[start:stop].view(torch.uint8)

    def scales(self, start: int, stop: int) -> Float[Tensor, "rows groups"]:
        return self.source.read(self.scale)[start:stop]

    def zeros(self, start: int, stop: int) -> UInt8[Tensor, "rows groups"] | None:
        if self.zero is None:
            return None
        first = start // WORD
        words = self.source.read(self.zero)[first : -(-stop // WORD)]
        rows = unpack_words(words.t().contiguous()).flatten(1).t()
        return rows[start - first * WORD : stop - first * WORD].contiguous()


def _pack_quantized(source: TensorSource, module: str, scheme: Scheme) -> VendorWeight:
    packed, scale, size = (f"{module}.weight_{part}" for part in ("packed", "scale", "shape"))
    parts = [packed, scale, size]
    rows, words = matrix_shape(source, packed)
    columns = words * WORD
    check_part(source, size, (torch.int64, torch.int32), (2,))
    check_part(source, packed, (torch.int32,), (rows, words))
    group, groups = _groups(source, packed, columns, scheme)
    check_part(source, scale, SCALE_DTYPES, (rows, groups))
    zero = f"{module}.weight_zero_point" if scheme.has_zeros else None
    if zero is not None:
        check_part(source, zero, (torch.int32,), (-(-rows // WORD), groups))
        parts.append(zero)
    return _PackQuantized((rows, columns), torch.float32, source, tuple(parts), group, scale, zero)


# --- AWQ and GPTQ -------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Gptq(_Int4):
    scheme: Scheme

    def pairs(self, start: int, stop: int) -> UInt8[Tensor, "rows half_columns"]:
        words = self.source.read(self.parts[0])
        if self.scheme.layout == "awq":
            codes = self._of_outputs(words, start, stop)
            return codes[:, ::2] | codes[:, 1::2] << 4
        return words[:, start:stop].t().contiguous().view(torch.uint8)

    def scales(self, start: int, stop: int) -> Float[Tensor, "rows groups"]:
        return self.source.read(self.scale)[:, start:stop].t().contiguous()

    def zeros(self, start: int, stop: int) -> UInt8[Tensor, "rows groups"] | None:
        assert self.zero is not None
        zeros = self._of_outputs(self.source.read(self.zero), start, stop)
        if self.scheme.layout == "gptq":
            zeros = zeros + 1
            if bool((zeros == MAX_ZERO).any()):
                raise UserError(
                    f"{self.source.where(self.zero)} has zero points out of range (stored as 15, "
                    "which programs read as 16 or as 0); save the model as gptq_v2"
                )
        return zeros

    def group_index(self) -> Int[Tensor, "columns"] | None:
        name = self.parts[-1]
        if not name.endswith("g_idx"):
            return None
        index = self.source.read(name).long()
        groups = self.source.shape(self.scale)[0]
        if bool((index < 0).any()) or bool((index >= groups).any()):
            raise UserError(
                f"{self.source.where(name)} names groups outside 0..{groups - 1}; the checkpoint "
                "is damaged, download it again"
            )
        return None if torch.equal(index, torch.arange(len(index)) // self.group) else index

    def _of_outputs(
        self, words: Int[Tensor, "lines words"], start: int, stop: int
    ) -> UInt8[Tensor, "rows lines"]:
        """Codes [start, stop) of each line, transposed."""
        first = start // WORD
        codes = unpack_words(words[:, first : -(-stop // WORD)].contiguous())
        if self.scheme.layout == "awq":
            codes = codes[..., torch.tensor(AWQ_ORDER).argsort()]
        return codes.flatten(1)[:, start - first * WORD : stop - first * WORD].t().contiguous()


def _gptq(source: TensorSource, module: str, scheme: Scheme) -> VendorWeight:
    weight, zero, scale, index = (
        f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")
    )
    parts = [weight, zero, scale]
    lines, width = matrix_shape(source, weight)
    rows, columns = (width * WORD, lines) if scheme.layout == "awq" else (width, lines * WORD)
    check_part(source, weight, (torch.int32,), (lines, width))
    group, groups = _groups(source, weight, columns, scheme)
    check_part(source, zero, (torch.int32,), (groups, -(-rows // WORD)))
    check_part(source, scale, SCALE_DTYPES, (groups, rows))
    if index in source.tensors:
        check_part(source, index, (torch.int32, torch.int64), (columns,))
        parts.append(index)
    return _Gptq((rows, columns), torch.float32, source, tuple(parts), group, scale, zero, scheme)


def _groups(source: TensorSource, name: str, columns: int, scheme: Scheme) -> tuple[int, int]:
    """Columns of a group, and groups of a row. Raises UserError unless groups are whole."""
    group = columns if scheme.group_size is None else scheme.group_size
    if columns % group or columns % GROUP_STEP:
        raise UserError(
            f"{source.where(name)} has {columns} columns, which are not whole groups of "
            f"{group if columns % group else GROUP_STEP}; such weights are not supported"
        )
    return group, columns // group


def unpack_words(words: Int[Tensor, "lines words"]) -> UInt8[Tensor, "lines words 8"]:
    """The codes of each int32, the lowest bits first."""
    packed = words.contiguous().view(torch.uint8).unflatten(-1, (-1, WORD // 2))
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2)
