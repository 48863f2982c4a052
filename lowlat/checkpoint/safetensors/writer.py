"""Writes safetensors files tensor by tensor, without knowing beforehand what will come.

The header stands before the data but is complete only after them. Room for it is left at the start
and padded with spaces, as the format allows; small files are closed up when they are done.
Owns one file's bytes; which tensors go where and what makes the whole thing safe is `save`'s.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlat.checkpoint.safetensors.reader import DTYPES

HEADER_ROOM = 2**20
"""Bytes left for the header: some 8,000 tensors."""
CLOSE_UP_BYTES = 2**26
"""Files with less data than this are rewritten without the unused room."""
ALIGNMENT = 64
"""Where the data begin, a multiple of this: vector loads from the mapped file stay aligned."""

CODES = {dtype: code for code, dtype in DTYPES.items()}
"""What files call a number type."""


class ShardWriter:
    """A safetensors file under construction. OSError passes through."""

    def __init__(self, path: Path):
        self.path = path
        self.data_bytes = 0
        self.names: list[str] = []
        self._header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._header_bytes = _encoded_size(self._header)
        self._file = path.open("xb+")
        self._file.seek(HEADER_ROOM)

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """Whether the header can take one more entry."""
        return self._header_bytes + _encoded_size({name: self._entry(tensor)}) <= HEADER_ROOM - 8

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor's bytes."""
        entry = self._entry(tensor)
        self._header_bytes += _encoded_size({name: entry})
        self._header[name] = entry
        self.names.append(name)
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        self._file.write(flat.numpy().data)
        self.data_bytes += len(flat)

    def finish(self) -> None:
        """Write the header and bring everything to the disk."""
        if self.data_bytes < CLOSE_UP_BYTES:
            self._file.seek(HEADER_ROOM)
            data = self._file.read(self.data_bytes)
            header = _encoded(self._header)
            header += b" " * (-(8 + len(header)) % ALIGNMENT)
            self._file.seek(0)
            self._file.write(len(header).to_bytes(8, "little") + header + data)
            self._file.truncate()
        else:
            header = _encoded(self._header).ljust(HEADER_ROOM - 8)
            self._file.seek(0)
            self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Let go of the file, complete or not."""
        self._file.close()

    def _entry(self, tensor: Tensor) -> dict[str, Any]:
        end = self.data_bytes + tensor.numel() * tensor.dtype.itemsize
        return {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self.data_bytes, end],
        }


def _encoded(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _encoded_size(part: dict[str, Any]) -> int:
    """Upper bound on what `part` adds to the header."""
    return len(_encoded(part)) + 1
