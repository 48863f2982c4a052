"""Paged KV cache: one entry per token and layer, for every kind of attention.

MLA stores [c_t ; k_R], with an indexer (DSA) [k_I ; c_t ; k_R], MHA, GQA and MQA store [K ; V],
others what their config defines; layers with different attention have entries of different widths.
Owns the memory; `engine.page_allocator` owns which sequence holds which page.
`attention.int8_entry` defines the bytes of an int8 entry.
"""

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from lowlat.attention.index_tiles import read_int8_keys, write_int8_keys
from lowlat.attention.int8_entry import entry_bytes, pack_entries, unpack_entries
from lowlat.config.attention import AttentionConfig, index_key_dim
from lowlat.config.kv_cache_size import index_key_bytes, int8_entry_bytes, packs_index_keys
from lowlat.config.model import ModelConfig
from lowlat.utils import huge_pages
from lowlat.utils.device import dtype_name

PAGE_SIZE = 64


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's entries in all decoder layers, MTP modules not counted: 70,272 for
    DeepSeek-V3 in bf16.
    """
    return sum(
        entry_bytes(config.attention_of(layer), dtype) for layer in range(config.num_hidden_layers)
    )


class PagedCache:
    """Entries of all layers in pages (blocks in vLLM) of `page_size` tokens: layers[i] is
    [pages, page_size, entry_dim], for torch.int8 uint8 [pages, page_size, entry_bytes].

    Layers are the decoder layers, then the MTP modules. A page number addresses the same page in
    every layer. Index keys, which sparse attention (DSA) reads of all tokens, are apart from the
    rest of the entry, which it reads of few: index_keys[i] is uint8 [pages, page_size, key_bytes]
    (`attention.index_tiles`), in fp32 and fp64 [pages, page_size, index_dim], None for layers
    without indexer. attentions: what this process has of every layer, by default all; None:
    nothing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        attentions: Sequence[AttentionConfig | None] | None = None,
    ) -> None:
        self.page_size = page_size
        self.dtype = dtype
        self.num_pages = num_pages
        if attentions is None:
            attentions = [config.attention_of(layer) for layer in range(config.num_cache_layers)]
        self.index_dims = [0 if one is None else index_key_dim(one) for one in attentions]
        """Elements of an index key of each layer; 0 without indexer."""
        self.entry_dims = [
            0 if one is None else one.entry_dim - index
            for one, index in zip(attentions, self.index_dims, strict=True)
        ]
        """Elements of an entry of each layer, without index key; 0 in layers of other processes."""
        is_packed = dtype == torch.int8
        self.quantized = [
            0 if one is None else (one.quantized_dim - index) * is_packed
            for one, index in zip(attentions, self.index_dims, strict=True)
        ]
        """int8 channels of an entry of each layer, without its index key."""

        def pages(elements: int, quantized: int) -> Tensor:
            if elements == 0:
                empty = torch.bfloat16 if is_packed else dtype
                return torch.empty(num_pages, page_size, 0, dtype=empty, device=device)
            stored = torch.uint8 if is_packed else dtype
            width = int8_entry_bytes(elements, quantized) if is_packed else elements
            return _zeros((num_pages, page_size, width), stored, torch.device(device))

        self.layers = [
            pages(elements, quantized)
            for elements, quantized in zip(self.entry_dims, self.quantized, strict=True)
        ]
        self._packs_index_keys = packs_index_keys(dtype_name(dtype))

        def index_pages(elements: int) -> Tensor | None:
            if elements == 0:
                return None
            stored = torch.uint8 if self._packs_index_keys else dtype
            width = index_key_bytes(elements, dtype_name(dtype)) // stored.itemsize
            return _zeros((num_pages, page_size, width), stored, torch.device(device))

        self.index_keys = [index_pages(elements) for elements in self.index_dims]

    def write(
        self, layer: int, slots: Int[Tensor, "tokens"], entries: Float[Tensor, "tokens entry_dim"]
    ) -> None:
        """Store the entries of new tokens, with their index keys in front: [k_I ; c_t ; k_R]."""
        index, quantized = self.index_dims[layer], self.quantized[layer]
        keys, rows = entries.split([index, self.entry_dims[layer]], dim=1)
        _put(self.layers[layer], slots, self._stored(rows, quantized))
        data = self.index_keys[layer]
        if data is None:
            return
        if self._packs_index_keys:
            write_int8_keys(data, slots, keys)
        else:
            _put(data, slots, keys.to(self.dtype))

    def _stored(self, rows: Tensor, quantized: int) -> Tensor:
        return pack_entries(rows, quantized) if self.dtype == torch.int8 else rows.to(self.dtype)

    def read(
        self, layer: int, pages: tuple[int, ...], length: int, dtype: torch.dtype
    ) -> Float[Tensor, "length entry_dim"]:
        """The first `length` entries of a sequence in `dtype`, without index keys; a view if that
        is the cache's dtype and the pages are contiguous, else a copy.
        """
        stored = self._pages(self.layers[layer], pages, length).flatten(0, 1)[:length]
        if self.quantized[layer]:
            return unpack_entries(stored, self.entry_dims[layer], self.quantized[layer], dtype)
        return stored.to(dtype)

    def read_index_keys(
        self, layer: int, pages: tuple[int, ...], length: int, dtype: torch.dtype
    ) -> Float[Tensor, "length index_dim"]:
        """The index keys of the first `length` tokens of a sequence in `dtype`."""
        data, width = self.index_keys[layer], self.index_dims[layer]
        assert data is not None
        block = self._pages(data, pages, length)
        if self._packs_index_keys:
            return read_int8_keys(block, width, dtype)[:length]
        return block.flatten(0, 1)[:length].to(dtype)

    def _pages(self, data: Tensor, pages: tuple[int, ...], length: int) -> Tensor:
        """The pages of the first `length` tokens: a view if they are contiguous, else a copy."""
        count, first = -(-length // self.page_size), pages[0]
        if pages[:count] == tuple(range(first, first + count)):
            return data[first : first + count]
        return data[list(pages[:count])]

    @property
    def tensors(self) -> list[Shaped[Tensor, "pages page_size stored"]]:
        """The memory of all layers: entries, then index keys."""
        return [*self.layers, *(keys for keys in self.index_keys if keys is not None)]

    def copy_page(self, source: int, destination: int) -> None:
        """Copy a page in every layer, for a fork that continues in a partly filled page."""
        for data in self.tensors:
            data[destination] = data[source]

    @cached_property
    def _page_rows(self) -> list[UInt8[Tensor, "pages bytes"]]:
        """The bytes of all pages, tensor by tensor: views."""
        return [data.flatten(1).view(torch.uint8) for data in self.tensors]

    @cached_property
    def _row_bytes(self) -> list[int]:
        return [rows.shape[1] for rows in self._page_rows]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return sum(self._row_bytes)

    def export_page(self, page: int, out: UInt8[Tensor, " page_bytes"]) -> None:
        """Copy the bytes of a page, tensor by tensor, to `out` in CPU memory."""
        for rows, part in zip(self._page_rows, out.split(self._row_bytes), strict=True):
            part.copy_(rows[page])

    def import_page(self, page: int, stored: UInt8[Tensor, " page_bytes"]) -> None:
        """Fill a page with bytes that `export_page` wrote."""
        for rows, part in zip(self._page_rows, stored.split(self._row_bytes), strict=True):
            rows[page].copy_(part)

    def copy_from(self, smaller: "PagedCache") -> None:
        """Copy all pages of a smaller cache of the same model."""
        for data, old in zip(self.tensors, smaller.tensors, strict=True):
            data[: smaller.num_pages] = old


def _put(data: Tensor, slots: Tensor, rows: Tensor) -> None:
    data.view(-1, data.shape[-1])[slots] = rows


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU, memory pages that are never written take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_pages.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
