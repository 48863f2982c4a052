"""Safetensors writer: header encoding, known tensors, or tensor by tensor.

A file is 8 bytes of header length (little-endian), a JSON header padded with spaces, then the data;
`reader` documents the format. Which tensors go into which file is the callers' choice.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowlat.checkpoint.safetensors.reader import DTYPES
from lowlat.utils.atomic_files import FileDigest, sync_descriptor, write_new_file

HEADER_ROOM = 2**20
"""Bytes that ShardWriter reserves for the header: some 8,000 tensors."""
CLOSE_UP_BYTES = 2**26
"""Files with less data than this are rewritten without the unused header bytes."""
ALIGNMENT = 64
"""The data begin at a multiple of this: vector loads from the mapped file stay aligned."""
PYTORCH = {"format": "pt"}
"""Metadata of model files, as transformers demands it."""

NamedTensor = tuple[str, Tensor]

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def entry(self, start: int) -> dict[str, Any]:
        """The header's entry for data that begin `start` bytes after the header."""
        return {
            "dtype": _CODES[self.dtype],
            "shape": list(self.shape),
            "data_offsets": [start, start + self.nbytes],
        }


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, tensor.dtype, tuple(tensor.shape))


def encode_header(
    tensors: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Header, length included, of a file with these tensors in this order.

    Raises ValueError for a name that comes twice.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    start = 0
    for tensor in tensors:
        if tensor.name in header:
            raise ValueError(f"tensor {tensor.name!r} comes twice in one file")
        header[tensor.name] = tensor.entry(start)
        start += tensor.nbytes
    return _padded(header)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a copy only where it is on a device or not contiguous."""
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data


def write_safetensors(path: Path, tensors: Sequence[NamedTensor]) -> FileDigest:
    """Write `tensors` as the new file `path` and fsync it; see `file_pieces`."""
    return write_new_file(path, file_pieces(tensors))


def file_pieces(
    tensors: Sequence[NamedTensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a file with `tensors`, of any dtype of safetensors, in pieces.

    At most one tensor is copied at a time. Raises ValueError for a name that comes twice.
    """
    # wide dtypes first, so that every tensor is aligned to its dtype and can be mapped
    ordered = sorted(tensors, key=lambda named: -named[1].dtype.itemsize)
    yield encode_header((spec_of(name, tensor) for name, tensor in ordered), metadata)
    for _, tensor in ordered:
        yield tensor_bytes(tensor)


class ShardWriter:
    """A safetensors file written tensor by tensor, without knowing beforehand what will come.

    Space for the header is reserved at the start and padded with spaces, as the format allows;
    small files are rewritten without the unused bytes at the end. OSError passes through.
    """

    def __init__(self, path: Path):
        self.path = path
        self.data_bytes = 0
        self.names: list[str] = []
        self._header: dict[str, Any] = {"__metadata__": PYTORCH}
        self._header_bytes = _encoded_size(self._header)
        self._file = path.open("xb+")
        self._file.seek(HEADER_ROOM)

    def has_room(self, name: str, tensor: Tensor) -> bool:
        """Whether the header can take one more entry."""
        entry = spec_of(name, tensor).entry(self.data_bytes)
        return self._header_bytes + _encoded_size({name: entry}) <= HEADER_ROOM - 8

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor's bytes."""
        entry = spec_of(name, tensor).entry(self.data_bytes)
        self._header_bytes += _encoded_size({name: entry})
        self._header[name] = entry
        self.names.append(name)
        data = tensor_bytes(tensor)
        self._file.write(data)
        self.data_bytes += len(data)

    def finish(self) -> None:
        """Write the header and fsync the file."""
        if self.data_bytes < CLOSE_UP_BYTES:
            self._file.seek(HEADER_ROOM)
            data = self._file.read(self.data_bytes)
            self._file.seek(0)
            self._file.write(_padded(self._header) + data)
            self._file.truncate()
        else:
            header = _encoded(self._header).ljust(HEADER_ROOM - 8)
            self._file.seek(0)
            self._file.write(len(header).to_bytes(8, "little") + header)
        self._file.flush()
        sync_descriptor(self._file.fileno())
        self.close()

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()


def _padded(header: dict[str, Any]) -> bytes:
    """Length and header, padded so that the data are aligned."""
    text = _encoded(header)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _encoded(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _encoded_size(part: dict[str, Any]) -> int:
    """Upper bound on what `part` adds to the header."""
    return len(_encoded(part)) + 1
