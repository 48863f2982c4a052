"""Index keys of sparse attention (DSA) in KV cache pages: int8 with one fp32 scale per key, unless
the cache is fp32 or fp64, in tiles of 16 consecutive tokens, in which the native kernels score keys
without packing them.

A tile is, for every 4 channels, the bytes value + 128 of all 16 tokens, then their scales. The
native implementation is csrc/kernels/index_keys.h.
"""

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lowlat.attention.int8_entry import pack_entries, unpack_entries

TOKENS = 16
"""Tokens of a tile: lanes of the kernels' vectors."""


def _is_tiled(page_size: int) -> bool:
    """Whether pages hold int8 index keys in tiles: those that native kernels can read. Others are
    row-major.
    """
    return page_size % TOKENS == 0


def write_int8_keys(
    data: UInt8[Tensor, "pages page_size key_bytes"],
    slots: Int[Tensor, "tokens"],
    keys: Float[Tensor, "tokens index_dim"],
) -> None:
    """Store keys in a cache."""
    width = keys.shape[1]
    stored = pack_entries(keys, width, group=width)
    if not _is_tiled(data.shape[1]):
        data.view(-1, data.shape[-1])[slots] = stored
        return
    stored[:, :-4] ^= 0x80
    tiles = data.view(-1, data.shape[-1] // 4, TOKENS, 4)
    tiles[slots // TOKENS, :, slots % TOKENS] = stored.unflatten(1, (-1, 4))


def read_int8_keys(
    pages: UInt8[Tensor, "pages page_size key_bytes"], index_dim: int, dtype: torch.dtype
) -> Float[Tensor, "tokens index_dim"]:
    """The keys of pages, in `dtype`."""
    if not _is_tiled(pages.shape[1]):
        return unpack_entries(pages.flatten(0, 1), index_dim, index_dim, dtype, group=index_dim)
    tiles = pages.reshape(-1, pages.shape[-1] // 4, TOKENS, 4)
    rows = tiles.transpose(1, 2).reshape(-1, pages.shape[-1])
    rows[:, :-4] ^= 0x80
    return unpack_entries(rows, index_dim, index_dim, dtype, group=index_dim)
