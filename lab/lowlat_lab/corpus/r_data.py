"""Character vectors from R's lazy-load databases (NAME.rdx and NAME.rdb).

Supports the part of R's serialisation (R Internals, section 1.8) that texts need: strings, vectors,
lists and attributes in XDR format. Functions, environments and promises are rejected.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any

from lowlat.utils.errors import UserError

NIL, REFERENCE, SYMBOL, PAIRS, CHARS = 254, 255, 1, 2, 9
LOGICALS, INTEGERS, REALS, STRINGS, LIST = 10, 13, 14, 16, 19
HAS_ATTRIBUTES, HAS_TAG = 1 << 9, 1 << 10
MAX_SIZE = 64 << 20
"""Maximum bytes of a decompressed object."""


@dataclass(frozen=True, slots=True)
class Named:
    """A vector or list with its attributes by name."""

    values: list[Any]
    attributes: dict[str, Any]


def read_texts(index: bytes, database: bytes, name: str) -> dict[str, list[str]]:
    """The character vectors of a database by name; other objects are skipped.

    index, database: contents of the .rdx and .rdb file. name: name of the database in error
    messages. Raises UserError for damaged or unsupported data.
    """
    try:
        table = _Reader(_inflate(index, 31)).read_object()
        places = dict(zip(table.attributes["names"].values, table.values, strict=True))["variables"]
        texts = {}
        for key, place in zip(places.attributes["names"].values, places.values, strict=True):
            start, length = place.values
            # An object is its length in four bytes, then a zlib stream.
            found = _Reader(_inflate(database[start + 4 : start + length], 15)).read_object()
            if isinstance(found, Named) and all(isinstance(line, str) for line in found.values):
                texts[key] = found.values
        return texts
    except (struct.error, zlib.error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{name} is not a supported R database ({error})") from error


def _inflate(data: bytes, window_bits: int) -> bytes:
    """Decompress zlib (15) or gzip (31) data of at most MAX_SIZE bytes."""
    stream = zlib.decompressobj(window_bits)
    plain = stream.decompress(data, MAX_SIZE)
    if not stream.eof:
        raise ValueError(f"an object is cut short or over {MAX_SIZE} bytes")
    return plain


class _Reader:
    """Cursor over serialised data."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 2
        if data[:2] != b"X\n":
            raise ValueError("not in XDR format")
        version = self._int()
        self.at += 8  # R version of the writer, oldest version that can read the data
        if version == 3:
            self._bytes(self._int())  # name of the native encoding
        self.references: list[str] = []

    def _int(self) -> int:
        (value,) = struct.unpack_from(">i", self.data, self.at)
        self.at += 4
        return value

    def _bytes(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise ValueError("an object is cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def read_object(self) -> Any:
        """The next object: None, a str, a Named, or a dict for a pair list."""
        flags = self._int()
        kind = flags & 255
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self.references[(flags >> 8) - 1]
        if kind == SYMBOL:
            self.references.append(self.read_object())
            return self.references[-1]
        if kind == CHARS:
            size = self._int()
            return "" if size == -1 else self._bytes(size).decode("utf-8", "replace")
        if kind == PAIRS:
            return self._pairs(flags)
        values = self._values(kind)
        attributes = self.read_object() if flags & HAS_ATTRIBUTES else {}
        return Named(values, attributes or {})

    def _values(self, kind: int) -> list[Any]:
        count = self._int()
        if kind in (STRINGS, LIST):
            if count > len(self.data):
                raise ValueError("a vector is longer than its data")
            return [self.read_object() for _ in range(count)]
        if kind in (INTEGERS, LOGICALS):
            return list(struct.unpack(f">{count}i", self._bytes(4 * count)))
        if kind == REALS:
            return list(struct.unpack(f">{count}d", self._bytes(8 * count)))
        raise ValueError(f"objects of type {kind} are not supported")

    def _pairs(self, flags: int) -> dict[str, Any]:
        """A pair list as a dict; NIL ends its cells."""
        pairs: dict[str, Any] = {}
        while flags & 255 == PAIRS:
            if flags & HAS_ATTRIBUTES:
                self.read_object()
            tag = self.read_object() if flags & HAS_TAG else ""
            pairs[tag] = self.read_object()
            flags = self._int()
        if flags & 255 != NIL:
            raise ValueError("a pair list does not end")
        return pairs
