"""Byte layout of a file that is planned before it is written: a header, then segments.

A planned file has a known size, needs little memory, and can be resumed segment by segment
(`resumable_writer`).
"""

from collections.abc import Callable, Iterator
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
    """Byte offset in the file."""
    size: int
    """Bytes."""
    pieces: Pieces
    """Makes the content."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A file to write: `header` at its start, then `segments`; gaps between them are zero."""

    name: str
    """File name in the destination folder."""
    header: bytes
    """Content from byte 0."""
    segments: tuple[Segment, ...]
    """In order of their offsets."""
    size: int
    """Bytes of the whole file."""
