"""Reader of safetensors files: the header is checked completely before any data is touched.

Format: 8 bytes header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}},
then the data, covered by the tensors without gap or overlap. `writer` is the counterpart.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowlat.checkpoint.mapped_file import MappedFile
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object, quoted

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_RANK = 8
MAX_ELEMENTS = 2**62
"""Bound on the product of a shape, zeros counted as ones: strides must fit 64 bits."""


class Extent(NamedTuple):
    """Dtype, shape and place of a tensor: bytes [start, stop) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """An opened, checked and mapped safetensors file. Raises UserError naming file and tensor."""

    def __init__(self, path: Path):
        self.path = path
        self._file = MappedFile(path)
        self.version = self._file.version
        self.metadata: Mapping[str, str]
        self.extents: Mapping[str, Extent]
        self.metadata, self.extents = _parse_header(self._file)

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the map; MappedFile documents in-place writes and truncation."""
        extent = self.extents[name]
        return self._file.tensor(extent.start, extent.dtype, extent.shape)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory."""
        self._file.release(self.extents[name].start, self.extents[name].stop)


def _parse_header(file: MappedFile) -> tuple[dict[str, str], dict[str, Extent]]:
    if file.size < 8:
        raise UserError(
            f"{file.path}: {file.size} bytes are no safetensors file; download it again"
        )
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_JSON_BYTES:
        raise UserError(
            f"{file.path}: header length {length} exceeds {MAX_JSON_BYTES}; not a safetensors file"
        )
    if 8 + length > file.size:
        raise UserError(
            f"{file.path}: the header ends at byte {8 + length} but the file has {file.size}; "
            "it is truncated, download it again"
        )
    header = parse_object(file.bytes(8, 8 + length), f"{file.path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{file.path}: header: __metadata__ must map names to texts")
    extents = {
        name: _parse_extent(file.path, name, entry, 8 + length) for name, entry in header.items()
    }
    _check_coverage(file, extents, 8 + length)
    return metadata, extents


def _parse_extent(path: Path, name: str, entry: Any, data_start: int) -> Extent:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(
            f"{where}: its header entry must have exactly dtype, shape and data_offsets"
        )
    dtype = entry["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(
            f"{where}: dtype {quoted(str(dtype))} is unknown; supported are {', '.join(DTYPES)}"
        )
    shape = _naturals(entry["shape"], f"{where}: shape")
    offsets = _naturals(entry["data_offsets"], f"{where}: data_offsets")
    elements, spread = 1, 1
    for size in shape:
        elements, spread = elements * size, spread * max(size, 1)
    if len(shape) > MAX_RANK or spread > MAX_ELEMENTS:
        raise UserError(f"{where}: shape {_short(shape)} is too large")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise UserError(
            f"{where}: data_offsets {_short(offsets)} must be [begin, end] with begin <= end"
        )
    expected = elements * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != expected:
        raise UserError(
            f"{where}: shape {list(shape)} of {dtype} takes {expected} bytes, data_offsets give "
            f"{_short((offsets[1] - offsets[0],))}"
        )
    return Extent(DTYPES[dtype], shape, data_start + offsets[0], data_start + offsets[1])


def _naturals(value: Any, where: str) -> tuple[int, ...]:
    """`value` as a tuple if it is a JSON list of whole numbers >= 0; true is no number."""
    if not isinstance(value, list) or len(value) > 64:
        raise UserError(f"{where} must be a short list of whole numbers")
    if not all(
        isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
    ):
        raise UserError(f"{where} must hold whole numbers that are not negative")
    return tuple(value)


def _check_coverage(file: MappedFile, extents: Mapping[str, Extent], data_start: int) -> None:
    end, before = data_start, "the header"
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].start, item[1].stop)):
        where = f"{file.path}: tensor {quoted(name)}"
        if extent.stop > file.size:
            raise UserError(
                f"{where}: its data end at byte {_short((extent.stop,))} but the file has "
                f"{file.size}; it is truncated, download it again"
            )
        if extent.start != end:
            fault = "overlaps" if extent.start < end else "leaves a gap after"
            raise UserError(
                f"{where}: its data {fault} {before}; the file is damaged, download it again"
            )
        end, before = extent.stop, f"tensor {quoted(name)}"
    if end != file.size:
        raise UserError(
            f"{file.path}: {file.size - end} bytes follow {before}; the file is damaged"
        )


def _short(numbers: tuple[int, ...]) -> str:
    """Numbers for an error message; huge ones are shortened (Python limits int to text)."""
    texts = [str(number) if number < 10**30 else "over 1e30" for number in numbers[:8]]
    return ", ".join([*texts, "..."] if len(numbers) > 8 else texts)
