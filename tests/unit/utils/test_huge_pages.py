"""Tensors in huge pages: same values, own memory, pages as requested."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from lowlat.utils.huge_pages import ALIGNMENT, BLOCK, HAS_HUGE_PAGES, HugePageAllocator, zeros

needs_huge_pages = pytest.mark.skipif(
    not HAS_HUGE_PAGES or not Path("/sys/kernel/mm/transparent_hugepage").exists(),
    reason="the system has no large pages",
)


def asks_for_huge_pages(tensor: torch.Tensor) -> bool:
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


@needs_huge_pages
def test_zeros_request_huge_pages() -> None:
    found = zeros(8 << 20)
    assert asks_for_huge_pages(found)
    small = torch.frombuffer(mmap.mmap(-1, 8 << 20), dtype=torch.uint8)
    assert not asks_for_huge_pages(small)
    assert not found.any()


@needs_huge_pages
def test_zeros_take_memory_when_they_are_written() -> None:
    before = resident()
    found = zeros(256 << 20)
    assert resident() - before < 16 << 20
    found[: 32 << 20] = 1
    assert resident() - before >= 32 << 20


def test_no_zeros() -> None:
    assert zeros(0).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32, torch.int64])
def test_tensors_stand_alone(dtype: torch.dtype) -> None:
    pages = HugePageAllocator()
    shapes = [(0, 3), (1,), (3,), (64, 1), (10, 100), ()]
    made = [pages.empty(*shape, dtype=dtype) for shape in shapes]
    for number, (shape, tensor) in enumerate(zip(shapes, made, strict=True)):
        assert tensor.dtype == dtype
        assert tensor.shape == shape
        assert tensor.is_contiguous()
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(made))


@needs_huge_pages
def test_tensors_begin_with_a_line_of_cache_in_huge_pages() -> None:
    pages = HugePageAllocator()
    for size in (1, 63, 64, 65, BLOCK - 1, BLOCK + 1, 5):
        made = pages.empty(size, dtype=torch.uint8)
        assert made.data_ptr() % ALIGNMENT == 0
        assert asks_for_huge_pages(made)


@needs_huge_pages
def test_a_block_lives_as_long_as_its_tensors() -> None:
    pages = HugePageAllocator()
    first, second = (pages.empty(1000, dtype=torch.float32).fill_(1) for _ in range(2))
    del pages, first
    gc.collect()
    assert second.sum() == 1000
    before = resident()
    large = HugePageAllocator().empty(16 << 20, dtype=torch.float32).fill_(1)
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
