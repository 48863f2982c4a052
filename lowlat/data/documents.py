"""What a corpus is made of: documents of text in pieces, and chats. Where they come from is
sources.py's, what becomes of them build.py's.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowlat.utils.errors import UserError

Invalid = Literal["error", "skip", "replace"]


class BadDocument(UserError):
    """A document that is no text, or no chat: its message names file and place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How sources are read."""

    field: str | None = None
    """The field of JSON objects, or the column of tables, that holds a document's text, or
    'messages'; None is 'text', in records that are not chats as well.
    """
    separator: str | None = None
    """The line between two documents of a text file; None: a file is one document."""
    invalid: Invalid = "error"
    """What becomes of a document with bytes that are no UTF-8: an error, left out and counted, or
    U+FFFD in their place. Leaving out also passes over broken JSON and chats no template takes.
    """
    patterns: tuple[str, ...] = ()
    """Which files of a folder are read, such as *.txt; () is all that are not hidden."""

    @property
    def text_field(self) -> str:
        return self.field or "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDocument:
    """Plain text, maybe more than memory holds."""

    origin: str
    """File and place, for error messages."""
    pieces: Callable[[], Iterable[str]]
    """The text in order, anew at every call. Raises BadDocument where it is no text."""
    source_bytes: int
    """How much of its source it took up."""

    def fingerprint(self) -> tuple[bytes, int, bool]:
        """(digest, bytes in UTF-8, whether there is anything but blanks). Reads all of it."""
        digest, size, written = hashlib.sha256(), 0, False
        for piece in self.pieces():
            data = piece.encode()
            digest.update(data)
            size += len(data)
            written = written or not piece.isspace()
        return digest.digest(), size, written and size > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatDocument:
    """Messages, of which the assistant's are to be learned."""

    origin: str
    """File and place, for error messages."""
    messages: Sequence[Mapping[str, Any]]
    """As chat templates take them."""
    tools: Sequence[Mapping[str, Any]] | None
    """Functions the assistant may call."""
    source_bytes: int
    """How much of its source it took up."""

    def fingerprint(self) -> tuple[bytes, int, bool]:
        """As a text's, of the messages as JSON; it is empty without an answer to learn."""
        value = {"messages": self.messages, "tools": self.tools}
        data = json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
        answered = any(message["role"] == "assistant" for message in self.messages)
        return hashlib.sha256(data).digest(), len(data), answered

    def texts(self) -> Iterator[str]:
        """What was said, for training a vocabulary."""
        for message in self.messages:
            for key in ("content", "reasoning_content"):
                if isinstance(text := message.get(key), str):
                    yield text


Document = TextDocument | ChatDocument
