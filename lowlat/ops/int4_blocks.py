"""Repack int4 weights of compressed-tensors, AWQ and GPTQ as blocks that the GGUF kernels multiply.

    weight = scale * (code - zero)

The numbers of a file are kept exactly: codes of 4 bits, scales with at most 16 significant bits
(bf16, fp16), integers 0 to 16 that stand for zero. Types continue the numbers of GGUF's:

    INT4_BF16  32 columns: bf16 scale, codes; zero is 8
    INT4_32    32 columns: word of scale and zero, codes
    INT4_128   128 columns: word of scale and zero, codes

A word is the fp32 scale with `zero` in its last 8 bits, which are 0 in such scales. Codes are 16
bytes per 32 columns: columns 0..15 in the low halves, 16..31 in the high ones. GGUF's Q4_0 has the
layout of INT4_BF16 and an fp16 scale.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

Q4_0, INT4_BF16, INT4_32, INT4_128 = 2, 200, 201, 202
SIZES = {Q4_0: (32, 18), INT4_BF16: (32, 18), INT4_32: (32, 20), INT4_128: (128, 68)}
"""Columns and bytes of a block."""
NAMES = {INT4_BF16: "int4", INT4_32: "int4", INT4_128: "int4"}
"""Types without a name in GGUF files."""
SYMMETRIC_ZERO = 8
"""The code that stands for zero in the types without zero points."""
MAX_ZERO = 16
_LOW = 0x0F0F0F0F0F0F0F0F


def int4_type(columns: int, group: int, scale: torch.dtype, *, has_zeros: bool) -> int:
    """The smallest type that holds rows of `columns` weights, scales of `group` columns each."""
    if group % 128 == 0 and columns % 128 == 0:
        return INT4_128
    if not has_zeros and scale == torch.bfloat16:
        return INT4_BF16
    return Q4_0 if not has_zeros and scale == torch.float16 else INT4_32


def fits_a_word(scale: Float[Tensor, "*any"]) -> bool:
    """Whether no scale has more significant bits than a word keeps."""
    return not bool((scale.float().contiguous().view(torch.int32) & 255).any())


def halves_apart(pairs: UInt8[Tensor, "*any 16"]) -> UInt8[Tensor, "*any 16"]:
    """Bytes of columns 2 i and 2 i + 1 -> bytes of columns i and 16 + i, of 32 columns each; the
    first column is in the low half.
    """
    first, last = pairs.contiguous().view(torch.int64).unbind(dim=-1)  # 8 bytes at a time
    even, odd = first & _LOW | (last & _LOW) << 4, first >> 4 & _LOW | last & ~_LOW
    both = [half.view(torch.uint8).unflatten(-1, (-1, 8)) for half in (even, odd)]
    return torch.stack(both, dim=-1).flatten(-2)


def encode_int4(
    kind: int,
    pairs: UInt8[Tensor, "rows half_columns"],
    scale: Float[Tensor, "rows blocks"],
    zero: UInt8[Tensor, "rows blocks"] | None = None,
) -> UInt8[Tensor, "rows row_bytes"]:
    """Rows in blocks of type `kind`, with one scale and zero per block; `pairs`: the codes of two
    adjacent columns per byte, the first in the low half.
    """
    width, _ = SIZES[kind]
    codes = halves_apart(pairs.view(*scale.shape, width // 32, 16)).flatten(2)
    if kind in (Q4_0, INT4_BF16):
        header = scale.to(torch.float16 if kind == Q4_0 else torch.bfloat16)[..., None]
    else:
        word = scale.float().contiguous().view(torch.int32)
        header = (word | (SYMMETRIC_ZERO if zero is None else zero.int()))[..., None]
    return torch.cat([header.contiguous().view(torch.uint8), codes], dim=-1).flatten(1)


def dequantize_int4(
    weight: UInt8[Tensor, "rows row_bytes"], kind: int
) -> Float[Tensor, "rows columns"]:
    """The weights of rows in blocks of type `kind` in fp32, exact: the reference implementation."""
    width, size = SIZES[kind]
    blocks = weight.unflatten(1, (-1, size))
    header, bytes_ = blocks.split([size - width // 2, width // 2], dim=-1)
    header, bytes_ = header.contiguous(), bytes_.unflatten(-1, (-1, 16))
    codes = torch.stack([bytes_ & 15, bytes_ >> 4], dim=-2).flatten(2)
    if kind in (Q4_0, INT4_BF16):
        scale = header.view(torch.float16 if kind == Q4_0 else torch.bfloat16).float()
        zero = torch.full_like(scale, SYMMETRIC_ZERO)
    else:
        word = header.view(torch.int32)
        scale, zero = (word & ~255).view(torch.float32), (word & 255).float()
    return ((codes.float() - zero) * scale).flatten(1)
