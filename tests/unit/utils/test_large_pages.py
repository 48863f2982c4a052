"""Tensors in large pages: same values, own memory, pages as asked for."""

import gc
from pathlib import Path

import pytest
import torch

from lowlat.utils.large_pages import ALIGNMENT, BLOCK, HAS_LARGE_PAGES, LargePages, zeros

needs_large_pages = pytest.mark.skipif(
    not HAS_LARGE_PAGES or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="the system has no large pages",
)


def asks_for_large_pages(tensor: torch.Tensor) -> bool:
    """Whether the mapping in which `tensor` begins does."""
    is_inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(part, 16) for part in first.split("-"))
            is_inside = start <= tensor.data_ptr() < end
        elif is_inside and first == "VmFlags:":
            return "hg" in line.split()
    return False


@needs_large_pages
def test_zeros_are_asked_for_in_large_pages() -> None:
    found = zeros(8 << 20)
    assert asks_for_large_pages(found)
    assert not asks_for_large_pages(torch.zeros(8 << 20, dtype=torch.uint8))
    assert not found.any()


@needs_large_pages
def test_zeros_take_memory_when_they_are_written() -> None:
    before = resident()
    found = zeros(256 << 20)
    assert resident() - before < 16 << 20
    found[: 32 << 20] = 1
    assert resident() - before >= 32 << 20


def test_no_zeros() -> None:
    assert zeros(0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
def test_held_tensors_are_equal_and_stand_alone(dtype: torch.dtype) -> None:
    pages = LargePages()
    sources = [torch.arange(n).to(dtype).reshape(-1, 1) for n in (0, 1, 3, 64, 1000)]
    sources += [torch.arange(12).to(dtype).view(3, 4).T, torch.tensor(7).to(dtype)]
    held = [pages.hold(source) for source in sources]
    for source, copy in zip(sources, held, strict=True):
        assert copy.dtype == dtype
        assert copy.shape == source.shape
        assert torch.equal(copy, source)
    for copy in held[1:]:
        copy.fill_(1)
    assert torch.equal(sources[4].flatten(), torch.arange(1000).to(dtype))
    assert all(bool((copy == 1).all()) for copy in held)


@needs_large_pages
def test_held_tensors_begin_with_a_line_of_cache_in_large_pages() -> None:
    pages = LargePages()
    for size in (1, 63, 64, 65, BLOCK - 1, BLOCK + 1, 5):
        held = pages.hold(torch.full((size,), 3, dtype=torch.uint8))
        assert held.data_ptr() % ALIGNMENT == 0
        assert asks_for_large_pages(held)


@needs_large_pages
def test_a_block_lives_as_long_as_its_tensors() -> None:
    pages = LargePages()
    first, second = pages.hold(torch.full((1000,), 3.0)), pages.hold(torch.ones(1000))
    del pages, first
    gc.collect()
    assert second.sum() == 1000
    before = resident()
    large = LargePages().hold(torch.ones(16 << 20))
    assert resident() - before >= 60 << 20
    del large
    gc.collect()
    assert resident() - before < 8 << 20


def resident() -> int:
    """Bytes of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError
