"""Index keys of sparse attention (DSA) in KV cache pages: tiles of 16 consecutive tokens, in which
the native kernels score keys without packing them.

A bf16 tile is, for every pair of channels, the pairs of all 16 tokens. An int8 tile is likewise in
steps of 4 channels, as value + 128, then of one fp32 scale per 64 channels. The native
implementation is csrc/kernels/index_keys.h.
"""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from lowlat.attention.int8_entry import pack_entries, unpack_entries

TOKENS = 16
"""Tokens of a tile: lanes of the kernels' vectors."""


def is_tiled(page_size: int, index_dim: int, dtype: torch.dtype) -> bool:
    """Whether a cache holds index keys in tiles: those that native kernels can read. Others are
    row-major.
    """
    is_whole = page_size % TOKENS == 0 and index_dim % 2 == 0
    return is_whole and dtype in (torch.bfloat16, torch.int8)


def write_tiles(
    data: Shaped[Tensor, "pages page_size stored"],
    slots: Int[Tensor, "tokens"],
    keys: Float[Tensor, "tokens index_dim"],
) -> None:
    """Store keys in a cache [pages, page_size, elements or bytes of a key]."""
    if data.dtype == torch.uint8:
        step, stored = 4, pack_entries(keys, keys.shape[1])
        values = stored[:, : -(-keys.shape[1] // 4) * 4]
        values ^= 0x80
    else:
        step, stored = 2, keys.to(data.dtype)
    tiles = data.view(-1, data.shape[-1] // step, TOKENS, step)
    tiles[slots // TOKENS, :, slots % TOKENS] = stored.unflatten(1, (-1, step))


def read_tiles(
    pages: Shaped[Tensor, "pages page_size stored"], index_dim: int, dtype: torch.dtype
) -> Float[Tensor, "tokens index_dim"]:
    """The keys of pages [pages, page_size, elements or bytes of a key]."""
    step = 4 if pages.dtype == torch.uint8 else 2
    tiles = pages.reshape(-1, pages.shape[-1] // step, TOKENS, step)
    rows = tiles.transpose(1, 2).reshape(-1, pages.shape[-1])
    if pages.dtype != torch.uint8:
        return rows.to(dtype)
    values = rows[:, : -(-index_dim // 4) * 4]
    values ^= 0x80
    return unpack_entries(rows, index_dim, index_dim, dtype)
