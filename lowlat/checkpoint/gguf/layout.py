"""Byte layout of a GGUF file to write: header, metadata, tensor table, aligned data."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

from lowlat.checkpoint.file_layout import FileLayout, Pieces, lay_out
from lowlat.checkpoint.gguf.file import DEFAULT_ALIGNMENT

ARCHITECTURE = "general.architecture"
"""The key that the gguf package writes first."""
COUNTS_OF_KEYS = 16
"""Bytes of magic, version and number of tensors, which the number of keys follows."""
COUNTS = COUNTS_OF_KEYS + 8


class GGUFTensorSpec(NamedTuple):
    """A tensor to write."""

    name: str
    """As llama.cpp names it."""
    kind: GGMLQuantizationType
    """How its values are stored."""
    shape: tuple[int, ...]
    """Slowest axis first."""
    size: int
    """Bytes."""
    pieces: Pieces


def plan_gguf(
    name: str,
    arch: str,
    keys: dict[str, Any],
    tensors: Sequence[GGUFTensorSpec],
    kept: Mapping[str, bytes] | None = None,
) -> FileLayout:
    """A GGUF file of architecture `arch` with metadata `keys` (see `metadata_writer`).

    kept: further entries as they are in another file (`GGUFFile.entry`), by key and in order; one
    that is also in `keys` gives only the place of that key.
    """
    made = {key: _entry(arch, key, value) for key, value in keys.items()}
    made = {ARCHITECTURE: _header(arch)[COUNTS:]} | made
    entries = dict(kept or {}) | made
    keys_of_file = _counted(_header(arch, tensors=tensors), entries.values())
    header = keys_of_file + _tensor_table(arch, tensors)
    parts = [(tensor.name, tensor.size, tensor.pieces) for tensor in tensors]
    return lay_out(name, header, parts, DEFAULT_ALIGNMENT)


def encode_metadata(entries: Collection[bytes]) -> bytes:
    """A GGUF file that holds `entries` (`GGUFFile.entry`) and no tensors."""
    return _counted(_header(""), entries)


def _counted(header: bytes, entries: Collection[bytes]) -> bytes:
    """Magic, version and number of tensors of `header`, then `entries` with their number."""
    counts = header[:COUNTS_OF_KEYS] + len(entries).to_bytes(8, "little")
    return b"".join([counts, *entries])


def _entry(arch: str, key: str, value: Any) -> bytes:
    """One key with its type and value."""
    return _header(arch, {key: value})[len(_header(arch)) :]


def _tensor_table(arch: str, tensors: Sequence[GGUFTensorSpec]) -> bytes:
    """Names, shapes, types and offsets."""
    return _header(arch, tensors=tensors)[len(_header(arch)) :]


def _header(
    arch: str, keys: Mapping[str, Any] | None = None, tensors: Sequence[GGUFTensorSpec] = ()
) -> bytes:
    """All bytes before the data, not yet aligned, as the gguf package writes them: counts, the
    architecture, `keys` and tensor table.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "header.gguf"
        writer = GGUFWriter(path, arch)
        for key, value in (keys or {}).items():
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
