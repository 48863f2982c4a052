"""The paged cache: one row per token and layer, whatever the attention.

MLA leaves [c_t ; k_R], MHA, GQA and MQA leave [K ; V]. Owns the memory; which page belongs to whom
is the engine's business.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import ModelConfig

PAGE_SIZE = 64


def cache_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes one token leaves in all decoder layers (MTP modules not counted): V3 in bf16
    is 70,272.
    """
    return config.num_hidden_layers * config.attention.row_dim * dtype.itemsize


class PagedCache:
    """Rows of all layers, in pages of `page_size` tokens: data [layers, pages, page_size, row_dim].

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
        # Zeros come from the system lazily: untouched pages cost no memory.
        self.data = torch.zeros(
            config.num_cache_layers,
            num_pages,
            page_size,
            config.attention.row_dim,
            dtype=dtype,
            device=device,
        )

    @property
    def num_pages(self) -> int:
        return self.data.shape[1]

    def write(
        self, layer: int, slots: Int[Tensor, "tokens"], rows: Float[Tensor, "tokens row_dim"]
    ) -> None:
        """Store the rows of new tokens."""
        self.data[layer].view(-1, self.data.shape[-1])[slots] = rows.to(self.data.dtype)

    def rows(
        self, layer: int, pages: tuple[int, ...], length: int
    ) -> Float[Tensor, "length row_dim"]:
        """The first `length` rows of a sequence; a view where its pages follow each other, else a
        copy.
        """
        count = -(-length // self.page_size)
        first = pages[0]
        if pages[:count] == tuple(range(first, first + count)):
            block = self.data[layer, first : first + count]
        else:
            block = self.data[layer, list(pages[:count])]
        return block.flatten(0, 1)[:length]

    def copy_page(self, source: int, destination: int) -> None:
        """Duplicate a page in every layer (a fork that goes on writing into a partly
        filled page).
        """
        self.data[:, destination] = self.data[:, source]
