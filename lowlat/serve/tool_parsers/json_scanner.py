"""Streaming JSON scanner: find the end of a JSON value character by character.

A scanner for objects, and parsers for strings and values. The formats interpret the keys.
"""

import json
import re

from lowlat.serve.tool_parsers.reader import IncrementalReader, Malformed, Steps

MAX_STRING = 1 << 16
MAX_VALUE = 1 << 20
MAX_DEPTH = 128
SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false|null")
ESCAPES = frozenset('"\\/bfnrtu')
HEX = frozenset("0123456789abcdefABCDEF")


class ObjectScanner:
    """State machine over one JSON object, from its opening brace to its end."""

    def __init__(self) -> None:
        self._closers: list[str] = []
        self._state = "value"
        self._scalar = ""
        self._digits = 0
        self._is_key = False
        self.is_done = False

    def scan(self, text: str) -> tuple[int, str]:
        """The number of characters of `text` that belong to the object, and these as valid JSON.

        Raw line breaks inside strings, which models write, become escapes. The scan stops at the
        end of the object (`is_done`) or before the first character that is invalid.
        """
        shown = []
        for index, char in enumerate(text):
            if self.is_done or not self._step(char):
                return index, "".join(shown)
            is_raw = self._state == "string" and char < " "
            shown.append(json.dumps(char)[1:-1] if is_raw else char)
        return len(text), "".join(shown)

    def _step(self, char: str) -> bool:
        """Whether `char` may come next; advances if so."""
        if self._state == "scalar":
            if char not in ",]} \t\r\n":
                self._scalar += char
                return len(self._scalar) <= 64 and char in "+-.0123456789eEtrufalsn"
            if not SCALAR.fullmatch(self._scalar):
                return False
            self._state = "after value"
        match self._state:
            case "string" | "escape" | "hex":
                return self._step_string(char)
            case _ if char in " \t\r\n":
                return True
            case "value" | "first item":
                return self._step_value(char)
            case "first key" | "key":
                return self._step_key(char)
            case "colon":
                self._state = "value"
                return char == ":"
            case _:
                return self._step_after(char)

    def _step_string(self, char: str) -> bool:
        match self._state:
            case "escape":
                self._state, self._digits = ("hex" if char == "u" else "string"), 0
                return char in ESCAPES
            case "hex":
                self._digits += 1
                self._state = "string" if self._digits == 4 else "hex"
                return char in HEX
            case _ if char == "\\":
                self._state = "escape"
            case _ if char == '"':
                self._state = "colon" if self._is_key else "after value"
        return True

    def _step_value(self, char: str) -> bool:
        if char == "]" and self._state == "first item":
            return self._close(char)
        if char in "{[":
            self._closers.append("}" if char == "{" else "]")
            self._state = "first key" if char == "{" else "first item"
            return len(self._closers) <= MAX_DEPTH
        if not self._closers:
            return False
        if char == '"':
            self._state, self._is_key = "string", False
            return True
        self._state, self._scalar = "scalar", char
        return char in "-0123456789tfn"

    def _step_key(self, char: str) -> bool:
        if char == "}" and self._state == "first key":
            return self._close(char)
        self._state, self._is_key = "string", True
        return char == '"'

    def _step_after(self, char: str) -> bool:
        if char != ",":
            return self._close(char)
        self._state = "key" if self._closers[-1] == "}" else "value"
        return True

    def _close(self, char: str) -> bool:
        if self._closers[-1] != char:
            return False
        self._closers.pop()
        self.is_done = not self._closers
        self._state = "after value"
        return True


def read_string(reader: IncrementalReader) -> Steps[str]:
    """Parse the next JSON string; returns it decoded."""
    yield from reader.expect('"')
    raw = '"'
    while len(raw) < MAX_STRING:
        raw += (yield from reader.read_until('"', limit=MAX_STRING)) + '"'
        body = raw[:-1]
        # After an odd number of backslashes the quote is escaped.
        if (len(body) - len(body.rstrip("\\"))) % 2 == 0:
            break
    try:
        return json.loads(raw, strict=False)
    except json.JSONDecodeError as error:
        raise Malformed(raw) from error


def read_value(reader: IncrementalReader) -> Steps[str]:
    """Parse the next JSON value; returns its text."""
    first = yield from reader.peek()
    if first == '"':
        return json.dumps((yield from read_string(reader)), ensure_ascii=False)
    if first in ("{", "["):
        return (yield from _read_nested(reader))
    return (yield from _read_scalar(reader))


def read_value_until(reader: IncrementalReader, literal: str, *, limit: int) -> Steps[str | None]:
    """Parse the next JSON value and the `literal` after it; returns the value with its spaces.

    Inside strings `literal` is text. Returns None and consumes nothing if no JSON value with this
    end follows within `limit` characters.
    """
    scanner = ObjectScanner()
    scanner.scan("[")  # whose items may be any value
    size = 0
    while True:
        coming = reader.ahead(size)
        count, shown = scanner.scan(coming)
        if shown != coming[:count]:
            return None  # a raw line break in a string is invalid JSON
        size += count
        if count < len(coming) or size > limit or scanner.is_done or reader.has_ended:
            break
        yield
    text = reader.unread[:size]
    if size > limit or not _is_json(text) or not (yield from reader.is_next(literal, after=size)):
        return None
    reader.skip(size + len(literal))
    return text


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _read_nested(reader: IncrementalReader) -> Steps[str]:
    scanner = ObjectScanner()
    pieces, size = [], 0
    while not scanner.is_done:
        if not (yield from reader.has_more()):
            raise Malformed("end")
        count, text = scanner.scan(reader.unread)
        size += count
        if (count < len(reader.unread) and not scanner.is_done) or size > MAX_VALUE:
            raise Malformed("value")
        reader.skip(count)
        pieces.append(text)
    return "".join(pieces)


def _read_scalar(reader: IncrementalReader) -> Steps[str]:
    text = ""
    while (char := (yield from reader.peek())) and char not in ",]} \t\r\n" and len(text) < 64:
        text += char
        reader.skip(1)
    if not SCALAR.fullmatch(text):
        raise Malformed(text)
    return text
