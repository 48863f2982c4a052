"""Kimi K2's calls, in a section of their own, each with an id that names it: functions.name:0."""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import Function, ToolFormat
from lowlat.serve.tool_parsers.lark import Lark, Rule
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import Calls

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"
MAX_HEADER = 256


class Kimi(ToolFormat):
    """The id says which function is called; its number counts the conversation's calls."""

    markers = (BEGIN, END, CALL, CALL_END, ARGUMENTS)
    opening = BEGIN

    def past_id(self, id: str, name: str, number: int) -> str:
        return f"functions.{name}:{number}"

    def read(self, calls: Calls) -> Steps[None]:
        while (opening := (yield from calls.content_until(BEGIN))) is not None:
            yield from calls.attempt(opening, self._read_section(calls))

    def _read_section(self, calls: Calls) -> Steps[None]:
        yield from calls.reader.skip_space()
        yield from calls.reader.expect(CALL)
        yield from calls.read_series(lambda: self._read_call(calls), CALL)
        yield from calls.reader.accept_within_call(END)

    def _read_call(self, calls: Calls) -> Steps[None]:
        header = yield from calls.reader.read_until(ARGUMENTS, limit=MAX_HEADER)
        id = header.strip()
        name, _, number = id.rpartition(":")
        name = calls.checked(name.removeprefix("functions."))
        yield from calls.reader.skip_space()
        if not number.isdecimal() or not (yield from calls.reader.is_next("{")):
            raise Malformed("header")
        calls.start(name)
        yield from calls.stream_object(CALL_END)
        yield from calls.reader.accept_within_call(CALL_END)

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        number = grammar.pattern("/[0-9]{1,4}/")
        bodies = [
            grammar.sequence(
                f"functions.{function.name}:", number, ARGUMENTS, grammar.json(function.schema)
            )
            for function in functions
        ]
        call = grammar.sequence(CALL, grammar.choice(bodies), CALL_END)
        listed = grammar.repeated(call, several=several)
        return grammar.sequence(listed, END)
