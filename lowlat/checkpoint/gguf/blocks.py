"""Encode rows as GGUF types: plain floats, and the quantized blocks Q8_0 and Q4_1.

K-quants (Q4_K, Q6_K, ...) are read (`file`), not written. Blocks hold the numbers of
`ops.quantized` without loss, in another byte order. A block is 32 columns of a
row:

    Q8_0  fp16 scale, 32 int8
    Q4_1  fp16 scale, fp16 minimum, 16 bytes: columns 0..15 in the low halves, 16..31 in the high
"""

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import Float, UInt8
from torch import Tensor

from lowlat.checkpoint.gguf.file import PLAIN
from lowlat.model.linear import pack
from lowlat.ops.calibrated_quantization import Importance
from lowlat.ops.quantized import Int4Weight, Int8Weight, int4_steps, int8_steps, numbers_by_row


def row_bytes(kind: GGMLQuantizationType, columns: int) -> int:
    """Bytes of a row; `columns` must be a multiple of the block."""
    block, size = GGML_QUANT_SIZES[kind]
    return columns // block * size


def fits(kind: GGMLQuantizationType, columns: int) -> bool:
    """Whether rows of `columns` are whole blocks."""
    return columns % GGML_QUANT_SIZES[kind][0] == 0


def encode(
    rows: Float[Tensor, "rows columns"],
    kind: GGMLQuantizationType,
    importance: Callable[[], Importance] | None = None,
) -> Tensor:
    """`rows` encoded as `kind`: a tensor of these bytes. importance: as of `pack`.

    Raises OverflowError where values of a block are not finite or too large.
    """
    if kind in PLAIN:
        return rows.to(PLAIN[kind])
    return QUANTIZED[kind](rows, importance)


def _q8_0(
    rows: Float[Tensor, "rows columns"], importance: Callable[[], Importance] | None
) -> UInt8[Tensor, "rows blocks 34"]:
    packed = Int8Weight(**_finite(pack(rows, "int8", importance=importance)))
    scale = numbers_by_row(packed.weight_scale)
    values = int8_steps(packed.weight).to(torch.int8)
    return torch.cat([_bytes(scale), _bytes(values)], dim=-1)[: len(rows)]


def _q4_1(
    rows: Float[Tensor, "rows columns"], importance: Callable[[], Importance] | None
) -> UInt8[Tensor, "rows blocks 20"]:
    packed = Int4Weight(**_finite(pack(rows, "int4", importance=importance)))
    scale, minimum = (numbers_by_row(part) for part in (packed.weight_scale, packed.weight_minimum))
    low, high = int4_steps(packed.weight).to(torch.uint8).chunk(2, dim=-1)
    return torch.cat([_bytes(scale), _bytes(minimum), low | high << 4], dim=-1)[: len(rows)]


def _finite(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    if not all(bool(part.float().isfinite().all()) for part in parts.values()):
        raise OverflowError
    return parts


def _bytes(numbers: Tensor) -> UInt8[Tensor, "rows blocks bytes"]:
    """The bytes of each block's numbers."""
    flat = numbers if numbers.dim() == 3 else numbers[..., None]
    return flat.contiguous().view(torch.uint8)


QUANTIZED = {GGMLQuantizationType.Q8_0: _q8_0, GGMLQuantizationType.Q4_1: _q4_1}
"""Encoders of the quantized types."""
