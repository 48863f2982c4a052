"""Reading a text that arrives in pieces, as if it were all there.

Parsers are generators: each `yield` waits for more text. They decide by what they have read alone,
never by where a piece ended, so that every way of cutting a text gives the same parts.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""A computation that pauses where it needs more text."""


class Malformed(Exception):
    """What was read is not a tool call after all."""


class Reader:
    """The unread text, and whether more can come."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._ended = False

    def feed(self, text: str) -> None:
        """Add text that has arrived."""
        kept = self._at if self._mark is None else self._mark
        self._text = self._text[kept:] + text
        self._at -= kept
        if self._mark is not None:
            self._mark = 0

    def end(self) -> None:
        """No more text will arrive."""
        self._ended = True

    def mark(self) -> None:
        """Remember this place for `rewind`."""
        self._mark = self._at

    def release(self) -> None:
        """Forget the marked place: what was read since is final."""
        self._mark = None

    def rewind(self) -> bool:
        """Go back to the marked place; False when there is none."""
        if self._mark is None:
            return False
        self._at, self._mark = self._mark, None
        return True

    @property
    def unread(self) -> str:
        """What has arrived and was not read."""
        return self._text[self._at :]

    @property
    def has_ended(self) -> bool:
        """Whether what is unread is all that comes."""
        return self._ended

    def ahead(self, count: int) -> str:
        """What of `unread` comes after its first `count` characters."""
        return self._text[self._at + count :]

    def skip(self, count: int) -> None:
        """Read `count` characters of `unread`."""
        self._at += count

    def has_more(self) -> Steps[bool]:
        """Wait for a character; False at the end of the text."""
        while self._at == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def peek(self) -> Steps[str]:
        """The next character, not read; "" at the end of the text."""
        return self._text[self._at] if (yield from self.has_more()) else ""

    def is_next(self, literal: str, *, after: int = 0) -> Steps[bool]:
        """Whether `literal` comes next, or `after` so many characters; waits no longer than it
        takes to know."""
        while True:
            start = self._at + after
            found = self._text[start : start + len(literal)]
            if found == literal:
                return True
            if self._ended or not literal.startswith(found):
                return False
            yield

    def accept(self, literal: str) -> Steps[bool]:
        """Read `literal` if it comes next."""
        is_next = yield from self.is_next(literal)
        if is_next:
            self._at += len(literal)
        return is_next

    def expect(self, literal: str) -> Steps[None]:
        """Read `literal`. Raises Malformed where something else comes."""
        if not (yield from self.accept(literal)):
            raise Malformed(literal)

    def accept_after_space(self, literal: str, *, keep: str = "") -> Steps[str | None]:
        """Read spaces, `literal` and not yet `keep`, if they come next.

        Returns the text read; None: something else comes, and nothing was read.
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
        """Read spaces and `literal` if they come next, or what there is of it where the text ends
        within it: an answer may be cut off there. Whether all of it came."""
        found = yield from self.accept_after_space(literal)
        if found is None and self._ended:
            rest = self.unread.lstrip()
            if rest and literal.startswith(rest):
                self._at = len(self._text)
        return found is not None

    def skip_space(self) -> Steps[None]:
        """Read what spaces and line ends come next."""
        while (yield from self.has_more()) and self._text[self._at].isspace():
            self._at += 1

    def skip_newlines(self) -> Steps[None]:
        """Read what line ends come next."""
        while (yield from self.accept("\n")):
            pass

    def read_until(self, literal: str, *, limit: int) -> Steps[str]:
        """What comes before `literal`, which is read too.

        Raises Malformed where it does not come within `limit` characters.
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
        """Like `read_until`, but `literal` is still to be read."""
        found = yield from self.read_until(literal, limit=limit)
        self._at -= len(literal)
        return found

    def pass_until(
        self, literal: str, emit: Callable[[str], None], *, held: str = ""
    ) -> Steps[str | None]:
        """Hand what comes before `literal` to `emit` as it comes.

        Returns what was read and not handed on: `literal` and the characters of `held` right before
        it. None: the text ended, and all of it was handed on.
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
                kept = unread[len(shown) : index + len(literal)]
                self._at += len(kept)
                return kept
            yield


def overlap(text: str, literal: str) -> int:
    """Length of the longest end of `text` that begins `literal`, which is not in `text`."""
    for size in range(min(len(literal) - 1, len(text)), 0, -1):
        if literal.startswith(text[-size:]):
            return size
    return 0
