"""One part of a save: a safetensors file, written front to back so that it can be hashed meanwhile.

Owns the bytes of a part that is written; `checkpoint.safetensors_file` reads it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowlat.checkpoint.safetensors.reader import DTYPES
from lowlat.utils.atomic_files import FileDigest, write_new_file

ALIGNMENT = 64
"""Where the data begin, a multiple of this: the mapped tensors are aligned for vector loads."""

NamedTensor = tuple[str, Tensor]

_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_part(path: Path, tensors: Sequence[NamedTensor]) -> FileDigest:
    """Write `tensors`, any dtype of safetensors, as the new file `path` and bring it to the disk.

    Beside the tensors themselves one is in memory at most, where it lies on another device or is
    not contiguous. Raises ValueError for a name that comes twice.
    """
    # wide dtypes first, so that every tensor is aligned to its dtype and can be mapped
    ordered = sorted(tensors, key=lambda named: -named[1].dtype.itemsize)
    return write_new_file(path, _pieces(ordered))


def _pieces(tensors: Sequence[NamedTensor]) -> Iterator[bytes | memoryview]:
    header = json.dumps(_header(tensors), separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    yield len(header).to_bytes(8, "little") + header
    for _, tensor in tensors:
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        yield flat.numpy().data


def _header(tensors: Sequence[NamedTensor]) -> dict[str, Any]:
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors:
        if name in header:
            raise ValueError(f"tensor {name!r} comes twice in one part")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    return header
