"""Kimi K2's tool calls: a section of calls whose ids contain the name, as functions.name:0."""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import ParserState

BEGIN, END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL, CALL_END = "<|tool_call_begin|>", "<|tool_call_end|>"
ARGUMENTS = "<|tool_call_argument_begin|>"
MAX_HEADER = 256


class KimiK2ToolParser(ToolParser):
    """The id contains the function's name and the number of the call in the conversation."""

    markers = (BEGIN, END, CALL, CALL_END, ARGUMENTS)
    opening = BEGIN

    def past_id(self, id: str, name: str, number: int) -> str:
        return f"functions.{name}:{number}"

    def read(self, state: ParserState) -> Steps[None]:
        while (opening := (yield from state.content_until(BEGIN))) is not None:
            yield from state.attempt(opening, self._read_section(state))

    def _read_section(self, state: ParserState) -> Steps[None]:
        yield from state.reader.skip_space()
        yield from state.reader.expect(CALL)
        yield from state.read_series(lambda: self._read_call(state), CALL)
        yield from state.reader.accept_within_call(END)

    def _read_call(self, state: ParserState) -> Steps[None]:
        header = yield from state.reader.read_until(ARGUMENTS, limit=MAX_HEADER)
        id = header.strip()
        name, _, number = id.rpartition(":")
        name = state.checked(name.removeprefix("functions."))
        yield from state.reader.skip_space()
        if not number.isdecimal() or not (yield from state.reader.is_next("{")):
            raise Malformed("header")
        state.start(name)
        yield from state.stream_object(CALL_END)
        yield from state.reader.accept_within_call(CALL_END)

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        number = grammar.pattern("/[0-9]{1,4}/")
        bodies = [
            grammar.sequence(
                f"functions.{function.name}:", number, ARGUMENTS, grammar.json(function.schema)
            )
            for function in functions
        ]
        call = grammar.sequence(CALL, grammar.choice(bodies), CALL_END)
        listed = grammar.repeated(call, parallel=parallel)
        return grammar.sequence(listed, END)
