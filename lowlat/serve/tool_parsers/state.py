"""What the formats of tool calls share: the calls made so far and how they become parts.

Owns ids, indexes and the way back where a call turns out to be none. The formats' own syntax is in
the files beside this one.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from lowlat.serve.tool_parsers.json_scanner import ObjectScanner, read_string, read_value
from lowlat.serve.tool_parsers.parts import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
    append_part,
)
from lowlat.serve.tool_parsers.reader import Malformed, Reader, Steps

NAME = re.compile(r"[a-zA-Z0-9_-]{1,128}")
SPACE = " \t\r\n"

Schemas = Mapping[str, Mapping[str, Any]]
"""Function name -> JSON schema of its arguments."""


class Calls:
    """An answer that is being read: `reader` has its text, `parts` what became of it."""

    def __init__(self, schemas: Schemas, new_id: Callable[[], str]) -> None:
        self.reader = Reader()
        self.parts: list[Part] = []
        self.schemas = schemas
        self.count = 0
        """Calls begun."""
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
        """Begin a call: what was read since the mark is final."""
        self.reader.release()
        self.parts.append(ToolCallStart(self.count, id or self._new_id(), name))
        self.count += 1
        self._is_after_call = True

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
        if text:
            append_part(self.parts, ToolCallArguments(self.count - 1, text))

    def content_until(self, literal: str) -> Steps[str | None]:
        """Pass content on up to `literal`; returns it, with the spaces before it, or None.

        Spaces around calls are part of the format: they are content only where text follows.
        """
        return (yield from self.reader.pass_until(literal, self._pass_content, held=SPACE))

    def _pass_content(self, text: str) -> None:
        if not (self._is_after_call and text.isspace()):
            self.content(text)

    def attempt(self, opening: str, call: Steps[None]) -> Steps[bool]:
        """Read `call`; where it is none, `opening` is content and what follows is read anew."""
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
        """`one` call, and more for as long as `separator` and a call come next."""
        yield from one()
        while (opening := (yield from self.reader.accept_after_space(separator))) is not None:
            if not (yield from self.attempt(opening, one())):
                return

    def stream_object(self, until: str | None) -> Steps[bool]:
        """Pass the object that comes next on as arguments.

        Once it is no JSON any more, everything up to `until` is passed on as the model wrote it;
        then the result is False.
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
        """Pass everything up to `until` on as arguments, as it is; `until` is read too."""
        if until is not None:
            yield from self.reader.pass_until(until, self.arguments)
            return
        while (yield from self.reader.has_more()):
            self.arguments(self.reader.unread)
            self.reader.skip(len(self.reader.unread))

    def read_object_call(self, *, until: str | None, only_known: bool = False) -> Steps[None]:
        """{"name": ..., "arguments": {...}} with members in any order; others are passed over.

        "parameters" is taken for "arguments". only_known: other names than those of the request's
        tools make it no call. Raises Malformed where it is none; a call once begun stays one, even
        where its own closing bracket is missing.
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
        """The object; name and arguments as far as they could not be passed on."""
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
        """`name`. Raises Malformed where it can be none of a function."""
        if name is None or not NAME.fullmatch(name) or (only_known and name not in self.schemas):
            raise Malformed("name")
        return name


def as_object(value: str) -> str:
    """The JSON object in `value`, which may be written as a string. Raises Malformed."""
    try:
        decoded = json.loads(value)
        text = decoded if isinstance(decoded, str) else value
        if isinstance(json.loads(text), dict):
            return text
    except (json.JSONDecodeError, RecursionError) as error:
        raise Malformed("arguments") from error
    raise Malformed("arguments")
