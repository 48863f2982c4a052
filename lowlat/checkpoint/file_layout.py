"""Byte layout of a file that is planned before it is written: a header, then segments.

A planned file has a known size, needs little memory, and can be resumed segment by segment
(`resumable_writer`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Pieces = Callable[[], Iterator[Tensor]]
"""Makes the bytes of a segment, in order: tensors of any dtype."""


class Segment(NamedTuple):
    """Bytes [start, start + size) of a file."""

    label: str
    """Names the segment in the journal: its first tensor."""
    start: int
    size: int
    pieces: Pieces


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file to write: `header` at its start, then `segments`; gaps between them are zero."""

    name: str
    """File name in the destination folder."""
    header: bytes
    segments: tuple[Segment, ...]
    """In order of their offsets."""
    size: int
    """Bytes of the whole file."""


def lay_out(
    name: str, header: bytes, parts: Iterable[tuple[str, int, Pieces]], alignment: int = 1
) -> FileLayout:
    """A file of `header` and `parts` (label, bytes, content), all padded to `alignment`."""
    at = aligned(len(header), alignment)
    header, segments = header.ljust(at, b"\0"), []
    for label, size, pieces in parts:
        segments.append(Segment(label, at, size, pieces))
        at += aligned(size, alignment)
    return FileLayout(name, header, tuple(segments), at)


def aligned(offset: int, alignment: int) -> int:
    """The next multiple of `alignment`."""
    return -(-offset // alignment) * alignment
