"""Memory-mapped file: tensors are copy-on-write views of the file, without reading or copying.

Owns opening, bounds and page advice (madvise); knows no file format.
"""

import math
import mmap
import os
import stat
import sys
from pathlib import Path

import torch
from torch import Tensor

from lowlat.utils.errors import UserError

# MAP_NORESERVE, absent from mmap: without it Linux counts private writable maps as used memory
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class MappedFile:
    """A regular file mapped copy-on-write for as long as this object or a tensor made by it lives.

    The file is opened read-only and never changes: a tensor written to in place gets private
    copies of the pages it touches. The mapping keeps its own descriptor, so replacing the file by
    another of the same name has no effect. The next `tensor` call raises UserError if the file was
    truncated under the mapping; touching pages of earlier tensors beyond the new end raises SIGBUS
    and ends the process. So replace model files (write aside, rename); never rewrite them in
    place.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # O_NONBLOCK: opening a pipe must not wait for a writer
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from error
        try:
            info = os.fstat(descriptor)
            if not stat.S_ISREG(info.st_mode):
                raise UserError(f"{path}: is not a regular file")
            if info.st_size == 0:
                raise UserError(f"{path}: the file is empty; download or convert it again")
            self.size = info.st_size
            self.version = f"{path.name} {self.size} {info.st_mtime_ns}"
            """Differs after the file was rewritten."""
            self._map = mmap.mmap(
                descriptor,
                self.size,
                flags=mmap.MAP_PRIVATE | _NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        except OSError as error:
            raise UserError(f"{path}: cannot be mapped ({error.strerror})") from error
        finally:
            os.close(descriptor)

    def bytes(self, start: int, stop: int) -> bytes:
        """A copy of bytes [start, stop), which must lie inside the file."""
        assert 0 <= start <= stop <= self.size
        return self._map[start:stop]

    def tensor(self, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The tensor whose bytes begin at `start`: a view of the map (a copy where `start` is not
        aligned).

        The extent must lie inside the file; callers check that when they parse the header.
        """
        length = math.prod(shape) * dtype.itemsize
        assert 0 <= start <= start + length <= self.size
        if self._map.size() < self.size:
            raise UserError(
                f"{self.path}: the file was cut short while in use; restore it and start again"
            )
        if length == 0:
            return torch.empty(shape, dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=start)
        if start % dtype.itemsize:
            flat = flat.clone()
        return flat.view(dtype).view(shape)

    def release(self, start: int, stop: int) -> None:
        """Drop the whole pages inside [start, stop) from memory; touching them reads the file
        again.

        Changes made to those pages through a tensor are lost, so only the code that made the
        tensor may call it.
        """
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        length = stop // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)
