"""Incremental parsing: read a text that arrives in chunks as if it were complete.

Parsers are generators: each `yield` waits for more text. Decisions depend on the text alone, never
on chunk boundaries, so every chunking gives the same parts.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A parser that pauses when it needs more text, and returns a T."""


class Malformed(Exception):
    """The text is not a tool call."""


class IncrementalReader:
    """The unread text and a backtracking mark."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._ended = False

    def feed(self, text: str) -> None:
        start = self._at if self._mark is None else self._mark
        self._text = self._text[start:] + text
        self._at -= start
        if self._mark is not None:
            self._mark = 0

    def end(self) -> None:
        self._ended = True

    def mark(self) -> None:
        """Set the backtracking mark for `rewind`."""
        self._mark = self._at

    def release(self) -> None:
        """Remove the mark: what was read since is final."""
        self._mark = None

    def rewind(self) -> bool:
        """Go back to the mark; False without one."""
        if self._mark is None:
            return False
        self._at, self._mark = self._mark, None
        return True

    @property
    def unread(self) -> str:
        """Text that has arrived and is not consumed."""
        return self._text[self._at :]

    @property
    def has_ended(self) -> bool:
        """Whether no more text will arrive."""
        return self._ended

    def ahead(self, count: int) -> str:
        """`unread` after its first `count` characters."""
        return self._text[self._at + count :]

    def skip(self, count: int) -> None:
        self._at += count

    def has_more(self) -> Steps[bool]:
        """Wait for a character; False at the end of the text."""
        while self._at == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def peek(self) -> Steps[str]:
        """The next character, not consumed; "" at the end of the text."""
        return self._text[self._at] if (yield from self.has_more()) else ""

    def is_next(self, literal: str, *, after: int = 0) -> Steps[bool]:
        """Whether `literal` comes next, or after `after` characters; waits only until decided."""
        while True:
            start = self._at + after
            found = self._text[start : start + len(literal)]
            if found == literal:
                return True
            if self._ended or not literal.startswith(found):
                return False
            yield

    def accept(self, literal: str) -> Steps[bool]:
        """Consume `literal` if it comes next."""
        is_next = yield from self.is_next(literal)
        if is_next:
            self._at += len(literal)
        return is_next

    def expect(self, literal: str) -> Steps[None]:
        """Consume `literal`. Raises Malformed if something else comes."""
        if not (yield from self.accept(literal)):
            raise Malformed(literal)

    def accept_after_space(self, literal: str, *, keep: str = "") -> Steps[str | None]:
        """Consume whitespace and `literal` if they come next, followed by `keep`.

        Returns the consumed text; None: something else comes, nothing is consumed.
        """
        wanted = literal + keep
        while True:
            unread = self.unread
            rest = unread.lstrip()
            if rest.startswith(wanted):
                size = len(unread) - len(rest) + len(literal)
                self._at += size
                return unread[:size]
            if self._ended or not wanted.startswith(rest):
                return None
            yield

    def accept_within_call(self, literal: str) -> Steps[bool]:
        """Consume whitespace and `literal` if they come next; returns whether all of it came.

        At the end of a truncated text, also consumes a prefix of `literal`.
        """
        found = yield from self.accept_after_space(literal)
        if found is None and self._ended:
            rest = self.unread.lstrip()
            if rest and literal.startswith(rest):
                self._at = len(self._text)
        return found is not None

    def skip_space(self) -> Steps[None]:
        while (yield from self.has_more()) and self._text[self._at].isspace():
            self._at += 1

    def skip_newlines(self) -> Steps[None]:
        while (yield from self.accept("\n")):
            pass

    def read_until(self, literal: str, *, limit: int) -> Steps[str]:
        """The text before `literal`; consumes both.

        Raises Malformed if `literal` does not come within `limit` characters.
        """
        while True:
            index = self._text.find(literal, self._at, self._at + limit + len(literal))
            if index >= 0:
                found = self._text[self._at : index]
                self._at = index + len(literal)
                return found
            if self._ended or len(self._text) - self._at >= limit + len(literal):
                raise Malformed(literal)
            yield

    def read_before(self, literal: str, *, limit: int) -> Steps[str]:
        """Like `read_until`, but does not consume `literal`."""
        found = yield from self.read_until(literal, limit=limit)
        self._at -= len(literal)
        return found

    def pass_rest(self, emit: Callable[[str], None]) -> Steps[None]:
        """Emit all text to the end as it arrives."""
        while (yield from self.has_more()):
            emit(self.unread)
            self._at = len(self._text)

    def pass_until(
        self, literal: str, emit: Callable[[str], None], *, held: str = ""
    ) -> Steps[str | None]:
        """Emit the text before `literal` as it arrives.

        Returns what was consumed but not emitted: `literal` and the characters of `held` right
        before it. None: the text ended, and all of it was emitted.
        """
        while True:
            unread = self.unread
            index = unread.find(literal)
            end = index if index >= 0 else len(unread) - overlap(unread, literal)
            if index < 0 and self._ended:
                end = len(unread)
            shown = unread[:end].rstrip(held) if held else unread[:end]
            emit(shown)
            self._at += len(shown)
            if index < 0 and self._ended:
                emit(self.unread)
                self._at += len(self.unread)
                return None
            if index >= 0:
                rest = unread[len(shown) : index + len(literal)]
                self._at += len(rest)
                return rest
            yield


def overlap(text: str, literal: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `literal`."""
    for size in range(min(len(literal) - 1, len(text)), 0, -1):
        if literal.startswith(text[-size:]):
            return size
    return 0
