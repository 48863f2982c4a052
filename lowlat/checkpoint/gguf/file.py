"""GGUF reader: checked metadata and tensor table, dequantization of block formats (Q8_0, Q4_1,
K-quants such as Q4_K and Q6_K, and the others that gguf-py decodes).

Format (versions 2 and 3, little-endian): magic, version, counts, key-value pairs, tensor infos,
then aligned data in the order of the infos. Owns bytes and block formats; `metadata_reader` and
`source` interpret keys and names.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from torch import Tensor

from lowlat.checkpoint.file_layout import aligned
from lowlat.checkpoint.mapped_file import MappedFile
from lowlat.ops.gguf_blocks import dequantize_blocks
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

MAX_KEYS = 2**16
MAX_TENSORS = 2**20
MAX_TEXT_BYTES = 2**24
MAX_ITEMS = 2**22
"""Entries of one array; the largest vocabularies have 2^18."""
MAX_RANK = 4
MAX_EXPERTS = 2**16
"""Entries of the first axis where there are three; each becomes a tensor."""
DEFAULT_ALIGNMENT = 32

SCALARS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "?",
}
PLAIN = {
    GGMLQuantizationType.F64: torch.float64,
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """An array of strings or of many numbers (a vocabulary): skipped, not decoded."""

    length: int


class GGUFTensor(NamedTuple):
    """Place of a tensor: bytes [start, stop) of the file; shape slowest axis first."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    stop: int


class GGUFFile:
    """GGUF reader: a checked, memory-mapped file. `split.open_parts` adds the other parts of a
    split model.

    Raises UserError that names the file and the key or tensor.
    """

    def __init__(self, path: Path):
        self.path = path
        file = MappedFile(path)
        cursor = _Cursor(file)
        tensors, keys = _read_counts(cursor)
        self.metadata: dict[str, Any] = {}
        self._keys, self._entries = file, dict[str, tuple[int, int]]()
        for _ in range(keys):
            start = cursor.at
            key = cursor.text("a key", 2**16)
            if key in self.metadata:
                raise UserError(f"{path}: key {quoted(key)} appears twice")
            self.metadata[key] = cursor.value(f"key {quoted(key)}")
            self._entries[key] = start, cursor.at
        self.tensors = _read_tensors(cursor, tensors, self._alignment())
        self._files = dict.fromkeys(self.tensors, file)

    def add_part(self, part: "GGUFFile") -> None:
        """Add the tensors of another part of a split model. Raises UserError if both have one."""
        for name in part.tensors:
            if name in self.tensors:
                raise UserError(
                    f"{part.path}: tensor {quoted(name)} is also in {self.path_of(name)}; one of "
                    "the parts is of another model, download them again"
                )
        self.tensors |= part.tensors
        self._files |= part._files

    def path_of(self, name: str) -> Path:
        """The file that holds the tensor: the part, if the model is split."""
        return self._files[name].path

    @property
    def versions(self) -> tuple[str, ...]:
        """`MappedFile.version` of each part."""
        return tuple(dict.fromkeys(file.version for file in (self._keys, *self._files.values())))

    def entry(self, key: str) -> bytes:
        """A key with its type and value, as the file holds them."""
        return self._keys.bytes(*self._entries[key])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of `read(name)`: the stored one, fp32 for block formats."""
        return PLAIN.get(self.tensors[name].kind, torch.float32)

    def read(self, name: str) -> Tensor:
        """The tensor: a view if its type is plain, else dequantized to fp32."""
        shape = self.tensors[name].shape
        return self.rows(name, 0, math.prod(shape[:-1])).view(shape)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Rows [first, last), all axes but the last taken as one; dtype as `read`."""
        kind, own_shape, start, stop = self.tensors[name]
        size = (stop - start) // math.prod(own_shape[:-1])
        start, stop = start + first * size, start + last * size
        shape = (last - first, own_shape[-1])
        if kind in PLAIN:
            return self._files[name].tensor(start, PLAIN[kind], shape)
        stored = self._files[name].tensor(start, torch.uint8, (shape[0], size))
        values = dequantize_blocks(stored, kind)
        self._files[name].release(start, stop)
        return values

    def stored_rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Bytes of rows [first, last), by default all: uint8 [rows, row_bytes], a view."""
        _, shape, start, stop = self.tensors[name]
        rows = math.prod(shape[:-1])
        size = (stop - start) // rows
        last = rows if last is None else last
        return self._files[name].tensor(start + first * size, torch.uint8, (last - first, size))

    def release(self, name: str) -> None:
        """Drop the tensor's pages from memory."""
        self._files[name].release(self.tensors[name].start, self.tensors[name].stop)

    def _alignment(self) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        valid = (
            isinstance(alignment, int)
            and 1 <= alignment <= 2**20
            and alignment & (alignment - 1) == 0
        )
        if not valid or isinstance(alignment, bool):
            raise UserError(
                f"{self.path}: key 'general.alignment' is {alignment!r}, not a power of two"
            )
        return alignment


class _Cursor:
    """Reads values in sequence, never past the end of the file."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.at = 0

    def take(self, count: int, what: str) -> bytes:
        if count > self.file.size - self.at:
            raise UserError(
                f"{self.file.path}: the file ends within {what}; it is truncated, download it again"
            )
        self.at += count
        return self.file.bytes(self.at - count, self.at)

    def number(self, size: int, what: str) -> int:
        return int.from_bytes(self.take(size, what), "little")

    def text(self, what: str, limit: int = MAX_TEXT_BYTES) -> str:
        length = self.number(8, what)
        if length > limit:
            raise UserError(f"{self.file.path}: {what}: a text of {length} bytes is too long")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.file.path}: {what}: the text is not UTF-8") from error

    def value(self, what: str) -> Any:
        kind = self._kind(what)
        if kind == GGUFValueType.STRING:
            return self.text(what)
        if kind == GGUFValueType.ARRAY:
            return self._array(what)
        return _scalar(self._numbers(kind, 1, what)[0])

    def _array(self, what: str) -> SkippedArray | list[Any]:
        kind = self._kind(what)
        count = self.number(8, what)
        if kind == GGUFValueType.ARRAY:
            raise UserError(f"{self.file.path}: {what}: arrays of arrays are not supported")
        if count > MAX_ITEMS:
            raise UserError(f"{self.file.path}: {what}: {count} items are too many")
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                self.take(self.number(8, what), what)
            return SkippedArray(count)
        numbers = self._numbers(kind, count, what)
        return [_scalar(item) for item in numbers] if count <= 256 else SkippedArray(count)

    def _kind(self, what: str) -> GGUFValueType:
        number = self.number(4, what)
        if number > max(GGUFValueType):
            raise UserError(f"{self.file.path}: {what}: value type {number} is unknown")
        return GGUFValueType(number)

    def _numbers(self, kind: GGUFValueType, count: int, what: str) -> np.ndarray:
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self.take(count * dtype.itemsize, what), dtype)


def _scalar(value: Any) -> int | float | bool:
    """A Python number; fp32 values as their shortest decimal: 1e-05, not 9.999999747378752e-06."""
    return float(str(value)) if value.dtype == np.float32 else value.item()


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    path = cursor.file.path
    if cursor.take(4, "the magic") != b"GGUF":
        raise UserError(f"{path}: does not begin with GGUF; not a GGUF file")
    version = cursor.number(4, "the version")
    if version not in (2, 3):
        big_endian = version != 0 and version & 0xFFFF == 0
        reason = "big-endian files are" if big_endian else f"version {version} is"
        raise UserError(
            f"{path}: {reason} not supported; convert the model with a current llama.cpp"
        )
    tensors, keys = cursor.number(8, "the tensor count"), cursor.number(8, "the key count")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise UserError(
            f"{path}: {tensors} tensors and {keys} keys are too many; the file is damaged"
        )
    return tensors, keys


def _read_tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, GGUFTensor]:
    infos = [_read_info(cursor) for _ in range(count)]
    path, data = cursor.file.path, aligned(cursor.at, alignment)
    tensors: dict[str, GGUFTensor] = {}
    end = 0
    for name, kind, shape, size, offset in infos:
        where = f"{path}: tensor {quoted(name)}"
        if name in tensors:
            raise UserError(f"{where} appears twice")
        if offset != end:
            raise UserError(
                f"{where}: offset {offset} is wrong, its data must begin at {end}; "
                "the file is damaged, download it again"
            )
        if data + offset + size > cursor.file.size:
            raise UserError(
                f"{where}: its data end at byte {data + offset + size} but the file has "
                f"{cursor.file.size}; it is truncated, download it again"
            )
        tensors[name] = GGUFTensor(kind, shape, data + offset, data + offset + size)
        end = aligned(offset + size, alignment)
    return tensors


def _read_info(cursor: _Cursor) -> tuple[str, GGMLQuantizationType, tuple[int, ...], int, int]:
    """Name, kind, shape, bytes and offset of the next tensor."""
    name = cursor.text("a tensor's name", 2**16)
    label = f"tensor {quoted(name)}"
    where = f"{cursor.file.path}: {label}"
    rank = cursor.number(4, label)
    if not 1 <= rank <= MAX_RANK:
        raise UserError(f"{where}: {rank} dimensions are not between 1 and {MAX_RANK}")
    shape = tuple(reversed([cursor.number(8, label) for _ in range(rank)]))
    if min(shape) < 1 or math.prod(shape) > 2**48 or (rank > 2 and shape[0] > MAX_EXPERTS):
        raise UserError(f"{where}: shape {list(shape)} is empty or too large")
    number = cursor.number(4, label)
    known = {int(kind) for kind in GGML_QUANT_SIZES}
    if number not in known:
        raise UserError(f"{where}: tensor type {number} is unknown")
    kind = GGMLQuantizationType(number)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise UserError(f"{where}: rows of {shape[-1]} are not whole {kind.name} blocks of {block}")
    if not _is_supported(kind):
        raise UserError(
            f"{where}: type {kind.name} cannot be dequantised; choose a file with another type"
        )
    return name, kind, shape, math.prod(shape) // block * block_bytes, cursor.number(8, label)


def _is_supported(kind: GGMLQuantizationType) -> bool:
    if kind in PLAIN:
        return True
    try:
        dequantize_blocks(torch.zeros(1, GGML_QUANT_SIZES[kind][1], dtype=torch.uint8), kind)
    except NotImplementedError:
        return False
    return True
