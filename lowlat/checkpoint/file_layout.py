"""Files whose every byte has its place before the first is written: what makes a conversion's size
known, its memory small, and an interrupted one go on.

Owns where things lie in safetensors files and in a GGUF file; writing them is `restart`'s.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from lowlat.checkpoint.gguf.file import DEFAULT_ALIGNMENT
from lowlat.checkpoint.hf_folder import SINGLE_FILE
from lowlat.checkpoint.safetensors.writer import ALIGNMENT, CODES
from lowlat.checkpoint.save import MAX_SHARD_BYTES

Pieces = Callable[[], Iterator[Tensor]]
"""Makes the bytes of a stretch of a file, in order: tensors of any dtype."""


class Stored(NamedTuple):
    """A tensor of a safetensors file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Group(NamedTuple):
    """Tensors made together; their bytes lie one after the other in a file."""

    tensors: tuple[Stored, ...]
    pieces: Pieces


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file; shape slowest axis first, `size` in bytes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    size: int
    pieces: Pieces


class Stretch(NamedTuple):
    """Bytes [start, start + size) of a file."""

    label: str
    start: int
    size: int
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file to write: `header` at its start, then `stretches`; what lies between is zero."""

    name: str
    header: bytes
    stretches: tuple[Stretch, ...]
    size: int


def plan_folder(
    groups: Iterable[Group], max_shard_bytes: int = MAX_SHARD_BYTES
) -> tuple[list[PlannedFile], bytes | None]:
    """Safetensors files of a checkpoint, and the content of their index if there are several.

    A shard ends before the group that would make it larger than `max_shard_bytes`.
    """
    shards: list[list[Group]] = [[]]
    sizes = [0]
    for group in groups:
        size = sum(tensor.size for tensor in group.tensors)
        if shards[-1] and sizes[-1] + size > max_shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(group)
        sizes[-1] += size
    if len(shards) == 1:
        return [_shard(SINGLE_FILE, shards[0])], None
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    files = [_shard(name, shard) for name, shard in zip(names, shards, strict=True)]
    weight_map = {
        tensor.name: name
        for name, shard in zip(names, shards, strict=True)
        for group in shard
        for tensor in group.tensors
    }
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    return files, (json.dumps(index, indent=2) + "\n").encode()


def plan_gguf(
    name: str, arch: str, keys: dict[str, Any], tensors: Sequence[GGUFTensor]
) -> PlannedFile:
    """A GGUF file of architecture `arch` with metadata `keys` (see `gguf_keys`)."""
    header = _gguf_header(arch, keys, tensors)
    at = _aligned(len(header))
    header = header.ljust(at, b"\0")
    stretches = []
    for tensor in tensors:
        stretches.append(Stretch(tensor.name, at, tensor.size, tensor.pieces))
        at += _aligned(tensor.size)
    return PlannedFile(name, header, tuple(stretches), at)


def _shard(name: str, groups: list[Group]) -> PlannedFile:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    spans: list[tuple[str, int, int, Pieces]] = []
    for group in groups:
        first = at
        for tensor in group.tensors:
            entries[tensor.name] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [at, at + tensor.size],
            }
            at += tensor.size
        spans.append((group.tensors[0].name, first, at - first, group.pieces))
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    stretches = tuple(Stretch(label, len(header) + a, size, p) for label, a, size, p in spans)
    return PlannedFile(name, header, stretches, len(header) + at)


def _gguf_header(arch: str, keys: dict[str, Any], tensors: Sequence[GGUFTensor]) -> bytes:
    """All bytes before the data, not yet aligned, as the gguf package writes them."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, arch)
        for key, value in keys.items():
            _add_key(writer, key, value)
        for tensor in tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, raw_dtype=tensor.kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        return path.read_bytes()


def _add_key(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _aligned(size: int) -> int:
    return -(-size // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
