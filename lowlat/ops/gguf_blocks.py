"""Dequantization of quantized blocks: GGUF types (Q4_K, IQ2_XXS, ...) and those of `int4_blocks`.

The gguf package is the reference implementation of its types; native kernels give the same bits.
"""

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from jaxtyping import Float, UInt8
from torch import Tensor

from lowlat.ops import int4_blocks, native
from lowlat.ops.quantized import TILE, Empty, num_tiles

INTERLEAVING_LEVELS = ("amx", "avx512")
"""Instruction-set levels with kernels for interleaved rows; the others gather single rows."""
CHUNK_ELEMENTS = 2**22
"""Elements dequantized at a time, so that intermediates stay small."""


def block_sizes(kind: int) -> tuple[int, int]:
    """Columns and bytes of a block of type number `kind`."""
    own = int4_blocks.SIZES.get(kind)
    return GGML_QUANT_SIZES[GGMLQuantizationType(kind)] if own is None else own


def type_name(kind: int) -> str:
    """Name of type number `kind`, of a GGUF type as in files."""
    own = int4_blocks.NAMES.get(kind)
    return GGMLQuantizationType(kind).name if own is None else own


def row_bytes(kind: int, columns: int) -> int:
    """Bytes of a row of `columns` values, which must be whole blocks."""
    block, size = block_sizes(kind)
    assert columns % block == 0
    return columns // block * size


def stored_shape(kind: int, rows: int, columns: int, interleaved: bool) -> tuple[int, int]:
    """Shape of a matrix in blocks of GGUF type number `kind`, as uint8."""
    return TILE * num_tiles(rows) if interleaved else rows, row_bytes(kind, columns)


def num_columns(kind: int, size: int) -> int:
    """Values of a row of `size` bytes."""
    block, block_bytes = block_sizes(kind)
    return size // block_bytes * block


def can_interleave(kind: int) -> bool:
    """Whether products with GGUF type number `kind` are faster from interleaved rows, on this
    machine and its level.
    """
    if not native.available() or native.level() not in INTERLEAVING_LEVELS:
        return False
    return any(number == kind and faster for number, *_, faster in native.module().gguf_types())


def interleave(
    rows: UInt8[Tensor, "rows row_bytes"], kind: int, empty: Empty = torch.empty
) -> UInt8[Tensor, "padded_rows row_bytes"]:
    """Blocks of 16 rows each as one, element by element (csrc/matrix.h); `empty` allocates."""
    out = empty(TILE * num_tiles(len(rows)), rows.shape[1], dtype=torch.uint8)
    module = native.module()
    module.interleave(module.Matrix.gguf(rows, type=kind), out)
    return out


def dequantize_blocks(
    weight: UInt8[Tensor, "stored_rows row_bytes"],
    kind: int,
    dtype: torch.dtype = torch.float32,
    *,
    interleaved_rows: int | None = None,
) -> Float[Tensor, "rows columns"]:
    """The values of rows in blocks of GGUF type number `kind`, rounded once to `dtype`;
    `interleaved_rows`: of how many rows `weight` is the interleaved form.

    Raises NotImplementedError for a type that the gguf package cannot dequantize.
    """
    if weight.device.type == "cpu" and _has_native_kernel(kind):
        made = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return dequantize_natively(weight, kind, made, interleaved_rows=interleaved_rows).to(dtype)
    assert interleaved_rows is None
    rows, columns = weight.shape[0], num_columns(kind, weight.shape[1])
    values = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    step = max(CHUNK_ELEMENTS // columns, 1)
    for first in range(0, rows, step):
        stored = weight[first : first + step].cpu().contiguous()
        if kind in int4_blocks.NAMES:
            values[first : first + step] = int4_blocks.dequantize_int4(stored, kind)
            continue
        # as one long row: the gguf package walks rows in groups of 16, slow for short ones
        with np.errstate(all="ignore"):
            chunk = dequantize(stored.numpy().reshape(1, -1), GGMLQuantizationType(kind))
        values[first : first + step] = torch.from_numpy(chunk).view(-1, columns)
    return values


def dequantize_natively(
    weight: UInt8[Tensor, "stored_rows row_bytes"],
    kind: int,
    dtype: torch.dtype = torch.float32,
    *,
    interleaved_rows: int | None = None,
    level: str = "",
) -> Float[Tensor, "rows columns"]:
    """Native kernel of `dequantize_blocks` for fp32 and bf16; `level` selects an instruction-set
    level.
    """
    module = native.module()
    matrix = module.Matrix.gguf(weight, type=kind, interleaved_rows=interleaved_rows)
    out = torch.empty(matrix.rows, matrix.columns, dtype=dtype)
    module.dequantize(matrix, out, level)
    return out


def _has_native_kernel(kind: int) -> bool:
    if not native.available():
        return False
    return any(number == kind for number, *_ in native.module().gguf_types())
