"""Index keys in the paged KV cache: read as written, in int8 (in tiles or row-major) or fp32."""

from dataclasses import replace

import pytest
import torch

from lowlat.attention.cache import PagedCache
from lowlat.attention.int8_entry import entry_bytes, pack_entries, unpack_entries
from lowlat.config.model import IndexerConfig
from tests import configs

from .draw import config_of

LAYOUTS = [
    (10, 16, torch.bfloat16),
    (9, 3, torch.bfloat16),
    (70, 32, torch.int8),
    (10, 16, torch.float32),
]


@pytest.mark.parametrize(("width", "page_size", "dtype"), LAYOUTS)
def test_entries_and_index_keys_are_read_as_written(
    width: int, page_size: int, dtype: torch.dtype
) -> None:
    """Over scattered and adjacent pages, of which the last is partly filled."""
    indexer = IndexerConfig(index_n_heads=2, index_head_dim=width, index_topk=4)
    attention = replace(configs.MLA, indexer=indexer)
    cache = PagedCache(
        config_of(attention, layers=2), num_pages=8, page_size=page_size, dtype=dtype
    )
    count = 3 * page_size - 1
    entries = torch.randn(count, attention.entry_dim).bfloat16().float()
    keys, rest = entries[:, :width], entries[:, width:]
    if dtype != torch.float32:
        scale = keys.abs().amax(dim=1, keepdim=True) / 127
        keys = (keys / scale).round() * scale
    if dtype == torch.int8:
        rest = unpack_entries(pack_entries(rest, 13), rest.shape[1], 13, torch.float32)
    position = torch.arange(count)
    for pages in ((6, 1, 4), (3, 4, 5)):
        slots = torch.tensor(pages)[position // page_size] * page_size + position % page_size
        order = torch.randperm(count)
        cache.write(1, slots[order], entries[order])
        assert torch.equal(cache.read_index_keys(1, pages, count, torch.float32), keys)
        assert torch.equal(cache.read(1, pages, count, torch.float32), rest)


@pytest.mark.parametrize(("width", "page_size", "dtype"), LAYOUTS)
def test_pages_hold_whole_entries(width: int, page_size: int, dtype: torch.dtype) -> None:
    """Copied, exported and imported with their index keys."""
    indexer = IndexerConfig(index_n_heads=2, index_head_dim=width, index_topk=4)
    attention = replace(configs.MLA, indexer=indexer)
    config = config_of(attention, layers=2)
    cache = PagedCache(config, num_pages=3, page_size=page_size, dtype=dtype)
    assert cache.page_bytes == 2 * page_size * entry_bytes(attention, dtype)
    cache.write(0, torch.arange(page_size), torch.randn(page_size, attention.entry_dim))
    cache.copy_page(0, 1)
    stored = torch.empty(cache.page_bytes, dtype=torch.uint8)
    cache.export_page(1, stored)
    cache.import_page(2, stored)
    for pages in ((1,), (2,)):
        for read in (cache.read, cache.read_index_keys):
            found = read(0, pages, page_size, torch.float32)
            assert torch.equal(found, read(0, (0,), page_size, torch.float32))
            assert found.count_nonzero() > 0
