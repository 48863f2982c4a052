"""The paged KV cache: entries are written to their slots and read in order."""

import os
from pathlib import Path

import pytest
import torch

from lowlat.attention.cache import PagedCache, cache_bytes_per_token
from lowlat.attention.int8_entry import pack_entries, unpack_entries

from .draw import GQA, MLA, config_of


def test_deepseek_v3_leaves_70272_bytes_per_token() -> None:
    """61 layers x (512 + 64) elements x 2 bytes; MTP modules are not counted."""
    v3 = config_of(MLA(kv_lora_rank=512, qk_rope_head_dim=64), layers=61, mtp=1)
    assert cache_bytes_per_token(v3, torch.bfloat16) == 70_272
    mha = config_of(GQA(num_attention_heads=128, num_key_value_heads=128, head_dim=128), layers=61)
    assert cache_bytes_per_token(mha, torch.bfloat16) == 61 * 2 * 128 * 128 * 2


def test_one_entry_per_token_and_layer() -> None:
    cache = PagedCache(config_of(MLA(), layers=3, mtp=2), num_pages=7, dtype=torch.bfloat16)
    assert [rows.shape for rows in cache.layers] == 5 * [(7, 64, 13 + 4)]
    assert cache.num_pages == 7 and cache.page_size == 64
    gqa = PagedCache(config_of(GQA(), layers=1), num_pages=2, page_size=3, dtype=torch.float32)
    assert [rows.shape for rows in gqa.layers] == [(2, 3, 2 * 2 * 6)]


@pytest.mark.parametrize("pages", [(2, 3, 4), (4, 1, 3), (5,), (0, 2)])
def test_entries_are_read_in_sequence_order(pages: tuple[int, ...]) -> None:
    """Contiguous pages are read as a view, scattered ones gathered; both give the same entries."""
    cache = PagedCache(config_of(MLA(), layers=2), num_pages=6, page_size=3, dtype=torch.float32)
    length = 3 * len(pages) - 1
    rows = torch.randn(length, 17)
    slots = torch.tensor([pages[i // 3] * 3 + i % 3 for i in range(length)])
    cache.write(1, slots, rows)
    assert torch.equal(cache.read(1, pages, length, torch.float32), rows)
    assert torch.equal(cache.read(1, pages, 2, torch.float32), rows[:2])
    assert cache.layers[0].count_nonzero() == 0
    assert cache.layers[1].count_nonzero() == rows.numel()


def test_more_pages_than_entries_are_allowed() -> None:
    cache = PagedCache(config_of(MLA(), layers=1), num_pages=6, page_size=3, dtype=torch.float32)
    rows = torch.randn(2, 17)
    cache.write(0, torch.tensor([9, 10]), rows)
    assert torch.equal(cache.read(0, (3, 0, 5), 2, torch.float32), rows)


def test_entries_are_stored_in_the_cache_dtype() -> None:
    cache = PagedCache(config_of(MLA(), layers=1), num_pages=1, dtype=torch.bfloat16)
    rows = torch.randn(5, 17)
    cache.write(0, torch.arange(5), rows)
    narrow = rows.to(torch.bfloat16)
    assert torch.equal(cache.read(0, (0,), 5, torch.bfloat16), narrow)
    assert torch.equal(cache.read(0, (0,), 5, torch.float64), narrow.double())


def test_plain_entries_of_contiguous_pages_are_not_copied() -> None:
    cache = PagedCache(config_of(MLA(), layers=2), num_pages=6, dtype=torch.bfloat16)
    rows = cache.read(1, (2, 3), 100, torch.bfloat16)
    assert rows.data_ptr() == cache.layers[1][2].data_ptr()


@pytest.mark.parametrize("pages", [(2, 3, 4), (4, 1, 3)])
def test_int8_entries(pages: tuple[int, ...]) -> None:
    """Every entry equals packing and unpacking it alone."""
    config = config_of(MLA(), layers=2)
    cache = PagedCache(config, num_pages=6, page_size=3, dtype=torch.int8)
    # 13 channels in 16 bytes, a scale, 4 in bf16
    assert [rows.shape for rows in cache.layers] == 2 * [(6, 3, 16 + 4 + 8)]
    assert cache.layers[0].dtype == torch.uint8
    assert (cache.dtype, cache.quantized) == (torch.int8, [13, 13])
    rows = torch.randn(8, 17)
    slots = torch.tensor([pages[i // 3] * 3 + i % 3 for i in range(8)])
    cache.write(1, slots, rows)
    expected = unpack_entries(pack_entries(rows, 13), 17, 13, torch.bfloat16)
    assert torch.equal(cache.read(1, pages, 8, torch.bfloat16), expected)
    assert cache.layers[0].count_nonzero() == 0


def test_int8_bytes_per_token() -> None:
    """V3: 512 + 8 scales of 4 + 64 x 2 = 672 bytes a layer, 58 % of bf16's 1152."""
    v3 = config_of(MLA(kv_lora_rank=512, qk_rope_head_dim=64), layers=61)
    assert cache_bytes_per_token(v3, torch.int8) == 61 * 672
    gqa = config_of(GQA(num_key_value_heads=2, head_dim=80), layers=3)
    assert cache_bytes_per_token(gqa, torch.int8) == 3 * (320 + 5 * 4)


def test_copy_page_copies_every_layer() -> None:
    cache = PagedCache(config_of(MLA(), layers=3), num_pages=4, page_size=2, dtype=torch.float32)
    before = [rows.normal_().clone() for rows in cache.layers]
    cache.copy_page(1, 3)
    for after, rows in zip(cache.layers, before, strict=True):
        assert torch.equal(after[3], rows[1])
        assert torch.equal(after[:3], rows[:3])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_pages_that_are_not_written_take_no_memory() -> None:
    """Regression: a server that takes most of a machine's memory before its first request."""

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    cache = PagedCache(config_of(MLA(), layers=2), num_pages=2**18, dtype=torch.bfloat16)
    assert sum(rows.nbytes for rows in cache.layers) > 2**30
    cache.write(1, torch.tensor([70]), torch.ones(1, cache.entry_dims[1]))
    assert resident() - before < 2**27
    assert cache.layers[1][1, 6].tolist() == [1.0] * cache.entry_dims[1]
