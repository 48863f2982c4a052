"""Memory in pages of 2 MiB where the system has them, for what is read from end to end again and
again.

Processors fetch ahead no further than to the end of a page, and look up where the next one lies: in
pages of 4 KiB a step over int4 weights takes a twentieth longer.
"""

import math
import mmap
import sys
from contextlib import suppress
from typing import final

import numpy as np
import torch
from torch import Tensor

BLOCK = 64 * 2**20
"""Bytes that tensors share; what is never written of them takes no memory."""
ALIGNMENT = 64
"""Bytes: a line of the processor's cache."""
HAS_LARGE_PAGES = sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE")


def zeros(size: int) -> Tensor:
    """`size` bytes of zeros, [size] of uint8, which take memory when they are first written."""
    if not HAS_LARGE_PAGES or size == 0:
        return torch.from_numpy(np.zeros(size, dtype=np.uint8))
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a system built without large pages refuses to be asked, and has small ones
    with suppress(OSError):
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8)


@final
class LargePages:
    """Tensors side by side in blocks of large pages; one lives as long as any of its tensors."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """As torch.empty, which it is where there are no large pages."""
        if not HAS_LARGE_PAGES:
            return torch.empty(shape, dtype=dtype)
        size = math.prod(shape) * dtype.itemsize
        taken = -(-size // ALIGNMENT) * ALIGNMENT
        if taken > len(self._block):
            self._block = zeros(max(taken, BLOCK))
        place, self._block = self._block[:size], self._block[taken:]
        return place.view(dtype).view(shape)
