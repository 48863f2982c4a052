"""ParserState: what all tool parsers share: the text, the calls so far, the parts they emit.

Holds ids and indexes, and backtracks when a supposed call is malformed. Each format's syntax is in
its own module.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lowlat.serve.protocol import limits
from lowlat.serve.tool_parsers.json_scanner import ObjectScanner, read_string, read_value
from lowlat.serve.tool_parsers.reader import IncrementalReader, Malformed, Steps

NAME = re.compile(rf"[a-zA-Z0-9_-]{{1,{limits.MAX_FUNCTION_NAME}}}")
SPACE = " \t\r\n"

Schemas = Mapping[str, Mapping[str, Any]]
"""Function name -> JSON schema of the arguments."""


@dataclass(frozen=True, slots=True)
class ContentPart:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """Reasoning before the content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; its arguments follow in ToolCallArguments of the same index."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Part = ContentPart | ReasoningPart | ToolCallStart | ToolCallArguments


def append_part(parts: list[Part], part: Part) -> None:
    """Append `part`, merged with the last one if both are pieces of the same text."""
    last = parts[-1] if parts else None
    match last, part:
        case (ContentPart(a), ContentPart(b)):
            parts[-1] = ContentPart(a + b)
        case (ReasoningPart(a), ReasoningPart(b)):
            parts[-1] = ReasoningPart(a + b)
        case (ToolCallArguments(i, a), ToolCallArguments(j, b)) if i == j:
            parts[-1] = ToolCallArguments(i, a + b)
        case _:
            parts.append(part)


class ParserState:
    """State of parsing one output: `reader` holds the text, `parts` the emitted parts."""

    def __init__(self, schemas: Schemas, new_id: Callable[[], str]) -> None:
        self.reader = IncrementalReader()
        self.parts: list[Part] = []
        self.schemas = schemas
        self.count = 0
        """Number of calls so far."""
        self._new_id = new_id
        self._is_after_call = False

    def content(self, text: str) -> None:
        if text:
            self._is_after_call = False
            append_part(self.parts, ContentPart(text))

    def reasoning(self, text: str) -> None:
        if text:
            append_part(self.parts, ReasoningPart(text))

    def start(self, name: str, *, id: str | None = None) -> None:
        """Begin a call; gives up the backtracking mark."""
        self.reader.release()
        self.parts.append(ToolCallStart(self.count, id or self._new_id(), name))
        self.count += 1
        self._is_after_call = True

    def arguments(self, text: str) -> None:
        if text:
            append_part(self.parts, ToolCallArguments(self.count - 1, text))

    def content_until(self, literal: str) -> Steps[str | None]:
        """Emit content up to `literal`; returns `literal` with the spaces before it, or None.

        Whitespace around calls is part of the format; it is content only if text follows.
        """
        return (yield from self.reader.pass_until(literal, self._pass_content, held=SPACE))

    def _pass_content(self, text: str) -> None:
        if not (self._is_after_call and text.isspace()):
            self.content(text)

    def attempt(self, opening: str, call: Steps[None]) -> Steps[bool]:
        """Parse `call`; if it is malformed, emit `opening` as content and backtrack."""
        self.reader.mark()
        try:
            yield from call
        except Malformed:
            if self.reader.rewind():
                self.content(opening)
                return False
        self.reader.release()
        return True

    def read_series(self, one: Callable[[], Steps[None]], separator: str) -> Steps[None]:
        """Parse `one` call, and more while `separator` and a call follow."""
        yield from one()
        while (opening := (yield from self.reader.accept_after_space(separator))) is not None:
            if not (yield from self.attempt(opening, one())):
                return

    def stream_object(self, until: str | None) -> Steps[bool]:
        """Emit the next JSON object as arguments.

        If it turns out to be invalid JSON, emits everything up to `until` unchanged and returns
        False.
        """
        scanner = ObjectScanner()
        while not scanner.is_done and (yield from self.reader.has_more()):
            unread = self.reader.unread
            count, text = scanner.scan(unread)
            self.arguments(text)
            self.reader.skip(count)
            if count < len(unread) and not scanner.is_done:
                yield from self.pass_broken(until)
                return False
        return True

    def pass_broken(self, until: str | None) -> Steps[None]:
        """Emit everything up to `until` as arguments, unchanged, and skip `until`."""
        if until is None:
            yield from self.reader.pass_rest(self.arguments)
        else:
            yield from self.reader.pass_until(until, self.arguments)

    def read_arguments(self, name: str, *, until: str | None, id: str | None = None) -> Steps[None]:
        """Parse the arguments of a call of `name`, as `stream_object` does. Raises Malformed if the
        name is invalid or no object follows.
        """
        self.checked(name)
        if not (yield from self.reader.is_next("{")):
            raise Malformed("arguments")
        self.start(name, id=id)
        yield from self.stream_object(until)

    def read_object_call(self, *, until: str | None, only_known: bool = False) -> Steps[None]:
        """Parse {"name": ..., "arguments": {...}} with members in any order; ignore others.

        "parameters" is a synonym of "arguments". only_known: the name must be one of the request's
        tools. Raises Malformed if it is no call; a call that has begun stays one, even if its
        closing bracket is missing.
        """
        count = self.count
        try:
            name, held = yield from self._read_members(until, only_known)
        except Malformed:
            if self.count == count:
                raise
            return
        if self.count == count:
            self.start(self.checked(name, only_known=only_known))
            self.arguments(held)

    def _read_members(self, until: str | None, only_known: bool) -> Steps[tuple[str | None, str]]:
        """Parse the object; returns the name and the arguments that were not emitted."""
        reader, name, held, count = self.reader, None, None, self.count
        yield from reader.expect("{")
        while True:
            yield from reader.skip_space()
            key = yield from read_string(reader)
            yield from reader.skip_space()
            yield from reader.expect(":")
            yield from reader.skip_space()
            if key == "name" and name is None:
                name = self.checked((yield from read_string(reader)), only_known=only_known)
            elif key in ("arguments", "parameters") and held is None and self.count == count:
                if name is not None and (yield from reader.is_next("{")):
                    self.start(name)
                    if not (yield from self.stream_object(until)):
                        raise Malformed("arguments")
                else:
                    held = as_object((yield from read_value(reader)))
            else:
                yield from read_value(reader)
            yield from reader.skip_space()
            if not (yield from reader.accept(",")):
                break
        yield from reader.expect("}")
        return name, held or "{}"

    def checked(self, name: str | None, *, only_known: bool = False) -> str:
        """`name`. Raises Malformed if it is not a valid function name."""
        if name is None or not NAME.fullmatch(name) or (only_known and name not in self.schemas):
            raise Malformed("name")
        return name


def as_object(value: str) -> str:
    """The JSON object in `value`, which may be encoded as a string. Raises Malformed."""
    try:
        decoded = json.loads(value)
        text = decoded if isinstance(decoded, str) else value
        if isinstance(json.loads(text), dict):
            return text
    except (json.JSONDecodeError, RecursionError) as error:
        raise Malformed("arguments") from error
    raise Malformed("arguments")
