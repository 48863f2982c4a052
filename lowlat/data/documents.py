"""Documents of a corpus: plain text, read in pieces, and chats."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lowlat.utils.errors import UserError

Invalid = Literal["error", "skip", "replace"]


class BadDocument(UserError):
    """A document that is not valid text or not a valid chat; names its file and position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadOptions:
    """How sources are read."""

    field: str | None = None
    """JSON field or table column with a document's text, or 'messages'. None: 'text', or messages
    in records without it.
    """
    separator: str | None = None
    """Line between two documents of a text file; None: a file is one document."""
    invalid: Invalid = "error"
    """Handling of a document that is not UTF-8: raise an error, skip and count it, or replace the
    bytes by U+FFFD. `skip` also skips invalid JSON and chats that the template rejects.
    """
    patterns: tuple[str, ...] = ()
    """Files of a folder to read, such as *.txt; (): all files that are not hidden."""

    @property
    def text_field(self) -> str:
        return self.field or "text"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextDocument:
    """Plain text, possibly larger than memory."""

    origin: str
    """File and position, for error messages."""
    pieces: Callable[[], Iterable[str]]
    """Reads the text from the start at every call. Raises BadDocument if it is not valid."""
    source_bytes: int
    """Bytes of the source, for progress."""

    def fingerprint(self) -> tuple[bytes, int, bool]:
        """(SHA-256, UTF-8 bytes, whether it has more than blanks). Reads the whole text."""
        digest, size, written = hashlib.sha256(), 0, False
        for piece in self.pieces():
            data = piece.encode()
            digest.update(data)
            size += len(data)
            written = written or not piece.isspace()
        return digest.digest(), size, written and size > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatDocument:
    """A chat, whose assistant messages are training targets."""

    origin: str
    """File and position, for error messages."""
    messages: Sequence[Mapping[str, Any]]
    """Messages in the format of chat templates."""
    tools: Sequence[Mapping[str, Any]] | None
    """Functions the assistant may call."""
    source_bytes: int
    """Bytes of the source, for progress."""

    def fingerprint(self) -> tuple[bytes, int, bool]:
        """(SHA-256, bytes, whether it has an answer) of the messages as JSON."""
        value = {"messages": self.messages, "tools": self.tools}
        data = json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
        answered = any(message["role"] == "assistant" for message in self.messages)
        return hashlib.sha256(data).digest(), len(data), answered

    def texts(self) -> Iterator[str]:
        """Texts of all messages, for training a vocabulary."""
        for message in self.messages:
            for key in ("content", "reasoning_content"):
                if isinstance(text := message.get(key), str):
                    yield text


Document = TextDocument | ChatDocument
