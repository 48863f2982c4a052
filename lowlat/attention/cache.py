"""Paged KV cache: one entry per token and layer, for every kind of attention.

MLA stores [c_t ; k_R], MHA, GQA and MQA store [K ; V], others what their config defines; layers
with different attention have entries of different widths. Owns the memory; `engine.page_allocator`
owns which sequence holds which page. `attention.int8_entry` defines the bytes of an int8 entry.
"""

import math

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from lowlat.attention.int8_entry import entry_bytes, pack_entries, unpack_entries
from lowlat.config.model import ModelConfig
from lowlat.utils import huge_pages

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
    every layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_size: int = PAGE_SIZE,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.page_size = page_size
        self.dtype = dtype
        self.num_pages = num_pages
        attentions = [config.attention_of(layer) for layer in range(config.num_cache_layers)]
        self.entry_dims = [attention.entry_dim for attention in attentions]
        """Elements of an entry of each layer."""
        is_packed = dtype == torch.int8
        self.quantized = [attention.quantized_dim * is_packed for attention in attentions]
        """int8 channels of an entry of each layer."""
        stored = torch.uint8 if is_packed else dtype
        self.layers = [
            _zeros(
                (num_pages, page_size, entry_bytes(attention, dtype) // stored.itemsize),
                stored,
                torch.device(device),
            )
            for attention in attentions
        ]

    def write(
        self, layer: int, slots: Int[Tensor, "tokens"], entries: Float[Tensor, "tokens entry_dim"]
    ) -> None:
        """Store the entries of new tokens."""
        quantized, data = self.quantized[layer], self.layers[layer]
        stored = pack_entries(entries, quantized) if quantized else entries.to(self.dtype)
        data.view(-1, data.shape[-1])[slots] = stored

    def read(
        self, layer: int, pages: tuple[int, ...], length: int, dtype: torch.dtype
    ) -> Float[Tensor, "length entry_dim"]:
        """The first `length` entries of a sequence in `dtype`; a view if that is the cache's dtype
        and the pages are contiguous, else a copy.
        """
        count = -(-length // self.page_size)
        first = pages[0]
        if pages[:count] == tuple(range(first, first + count)):
            block = self.layers[layer][first : first + count]
        else:
            block = self.layers[layer][list(pages[:count])]
        stored = block.flatten(0, 1)[:length]
        if self.quantized[layer]:
            return unpack_entries(stored, self.entry_dims[layer], self.quantized[layer], dtype)
        return stored.to(dtype)

    def copy_page(self, source: int, destination: int) -> None:
        """Copy a page in every layer, for a fork that continues in a partly filled page."""
        for data in self.layers:
            data[destination] = data[source]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return sum(data.shape[1] * data.shape[2] * data.itemsize for data in self.layers)

    def export_page(self, page: int, out: UInt8[Tensor, " page_bytes"]) -> None:
        """Copy the bytes of a page, layer by layer, to `out` in CPU memory."""
        start = 0
        for data in self.layers:
            part = data[page].flatten().view(torch.uint8)
            out[start : start + len(part)] = part
            start += len(part)

    def import_page(self, page: int, stored: UInt8[Tensor, " page_bytes"]) -> None:
        """Fill a page with bytes that `export_page` wrote."""
        start = 0
        for data in self.layers:
            part = data[page].flatten().view(torch.uint8)
            part.copy_(stored[start : start + len(part)])
            start += len(part)

    def copy_from(self, smaller: "PagedCache") -> None:
        """Copy all pages of a smaller cache of the same model."""
        for data, old in zip(self.layers, smaller.layers, strict=True):
            data[: smaller.num_pages] = old


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU, memory pages that are never written take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_pages.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
