"""Reader of text files of any size, plain or gzipped, with bounded memory. `records` reads tables
and JSON.

One pass over a file finds its documents. Small documents stay in memory while they are used; large
ones are read again each time.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

from lowlat.data.documents import BadDocument, Invalid, ReadOptions, TextDocument
from lowlat.text.pieces import text_pieces
from lowlat.utils.errors import UserError

CHUNK = 1 << 20
"""Bytes read at once."""
KEPT = 1 << 23
"""Largest document, in bytes, that stays in memory."""
BYTE_ORDER_MARK = codecs.BOM_UTF8


def read_text(path: Path, options: ReadOptions) -> Iterator[TextDocument]:
    """Documents of the text file `path`. Raises UserError if it cannot be read."""
    several = options.separator is not None
    for extent in _extents(path, options.separator):
        start = extent.start
        origin = f"{path}: document at byte {start}" if several else str(path)
        yield TextDocument(
            origin=origin,
            pieces=_Pieces(path, extent, options.invalid),
            source_bytes=extent.stop - start,
        )


def open_binary(path: Path) -> BufferedIOBase:
    """Open `path` for reading, decompressed if its name ends in .gz. Raises OSError."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def unreadable(path: Path, error: Exception) -> UserError:
    """UserError for a file that failed in `open_binary` or while it was read."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return UserError(f"{path}: cannot be read ({reason}); restore the file or leave it out")


READ_ERRORS = (OSError, EOFError, zlib.error)


class _Extent:
    """Byte range of a document in its file, with the bytes if they are at most KEPT."""

    def __init__(self, start: int) -> None:
        self.start = self.stop = start
        """First byte, in the decompressed file, and the byte after the last."""
        self._chunks: list[bytes] = []

    def add(self, chunk: bytes) -> None:
        self.stop += len(chunk)
        if self.stop - self.start > KEPT:
            self._chunks.clear()
        else:
            self._chunks.append(chunk)

    def data(self) -> bytes | None:
        """The bytes; None for more than KEPT."""
        self._chunks = [b"".join(self._chunks)]
        return self._chunks[0] if self.stop - self.start <= KEPT else None


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Reads one document from its start at every call."""

    path: Path
    extent: _Extent
    invalid: Invalid

    def __call__(self) -> Iterator[str]:
        return text_pieces(self._texts())

    def _texts(self) -> Iterator[str]:
        errors = "replace" if self.invalid == "replace" else "strict"
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        place = self.extent.start
        for chunk in self._chunks():
            yield self._decoded(decoder, chunk, place, final=False)
            place += len(chunk)
        yield self._decoded(decoder, b"", place, final=True)

    def _decoded(
        self, decoder: codecs.IncrementalDecoder, chunk: bytes, place: int, *, final: bool
    ) -> str:
        waiting = len(decoder.getstate()[0])
        try:
            return decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            where = place - waiting + error.start
            raise BadDocument(
                f"{self.path}: byte {where} is not UTF-8 text; convert the file, or pass"
                " --invalid skip or replace"
            ) from error

    def _chunks(self) -> Iterator[bytes]:
        extent = self.extent
        data = extent.data()
        if data is not None:
            yield data
            return
        try:
            with open_binary(self.path) as file:
                file.seek(extent.start)
                left = extent.stop - extent.start
                while left > 0 and (chunk := file.read(min(CHUNK, left))):
                    left -= len(chunk)
                    yield chunk
        except READ_ERRORS as error:
            raise unreadable(self.path, error) from error
        if left > 0:
            raise UserError(f"{self.path}: became shorter while it was read; build again")


def _extents(path: Path, separator: str | None) -> Iterator[_Extent]:
    """Byte ranges of the documents of a file, without a byte order mark at its start."""
    try:
        with open_binary(path) as file:
            if file.read(len(BYTE_ORDER_MARK)) != BYTE_ORDER_MARK:
                file.seek(0)
            yield from _parts(file, None if separator is None else separator.encode())
    except READ_ERRORS as error:
        raise unreadable(path, error) from error


def _parts(file: BufferedIOBase, separator: bytes | None) -> Iterator[_Extent]:
    """Byte ranges before, between and after the lines that equal the separator."""
    part = _Extent(file.tell())
    at_line_start = True
    while chunk := file.read(CHUNK) if separator is None else file.readline(CHUNK):
        if at_line_start and separator is not None and chunk.rstrip(b"\r\n") == separator:
            yield part
            part = _Extent(part.stop + len(chunk))
        else:
            part.add(chunk)
        at_line_start = chunk.endswith(b"\n")
    yield part
