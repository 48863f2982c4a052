"""The paged cache: one row per token and layer, whatever the attention.

MLA leaves [c_t ; k_R], MHA, GQA and MQA leave [K ; V], other paths what their config says; layers
that differ in their attention leave rows of different widths. Owns the memory; which page belongs
to whom is the engine's business. What a row is made of in int8 is `rows`'s.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.attention.int8_entry import entry_bytes, pack_entries, unpack_entries
from lowlat.config.model import ModelConfig
from lowlat.utils import huge_pages

PAGE_SIZE = 64


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes one token leaves in all decoder layers (MTP modules not counted): V3 in bf16
    is 70,272.
    """
    return sum(
        entry_bytes(config.attention_of(layer), dtype) for layer in range(config.num_hidden_layers)
    )


class PagedCache:
    """Rows of all layers, in pages of `page_size` tokens: layers[i] is [pages, page_size,
    entry_dim], for torch.int8 [pages, page_size, entry_bytes] of bytes, each layer's rows as wide
    as they are.

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
        """Elements of a row of each layer."""
        is_packed = dtype == torch.int8
        self.quantized = [attention.quantized_dim * is_packed for attention in attentions]
        """Channels of a row of each layer that are int8."""
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
        self, layer: int, slots: Int[Tensor, "tokens"], rows: Float[Tensor, "tokens entry_dim"]
    ) -> None:
        """Store the rows of new tokens."""
        quantized, data = self.quantized[layer], self.layers[layer]
        stored = pack_entries(rows, quantized) if quantized else rows.to(self.dtype)
        data.view(-1, data.shape[-1])[slots] = stored

    def rows(
        self, layer: int, pages: tuple[int, ...], length: int, dtype: torch.dtype
    ) -> Float[Tensor, "length entry_dim"]:
        """The first `length` rows of a sequence in `dtype`; a view where that is the cache's and
        its pages follow each other, else a copy.
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
        """Duplicate a page in every layer (a fork that goes on writing into a partly
        filled page).
        """
        for data in self.layers:
            data[destination] = data[source]

    def copy_from(self, smaller: "PagedCache") -> None:
        """Take over all pages of a cache of the same model."""
        for data, old in zip(self.layers, smaller.layers, strict=True):
            data[: smaller.num_pages] = old


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU pages of the cache that are never written take no memory."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return huge_pages.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)
