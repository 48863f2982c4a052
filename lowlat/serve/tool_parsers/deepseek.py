"""DeepSeek's tool-call formats, a section of calls: that of V3 and R1, and that of V3.1."""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import ParserState

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
SEPARATOR = "<｜tool▁sep｜>"  # noqa: RUF001
FENCE, FENCE_END = "\n```json\n", "\n```"
MAX_HEADER = 256


class _DeepSeek(ToolParser):
    markers = (BEGIN, END, CALL, CALL_END, SEPARATOR)
    opening = BEGIN
    json_arguments = True
    needs_content = False

    def read(self, state: ParserState) -> Steps[None]:
        while (opening := (yield from state.content_until(BEGIN))) is not None:
            yield from state.attempt(opening, self._read_section(state))

    def _read_section(self, state: ParserState) -> Steps[None]:
        yield from state.reader.skip_space()
        yield from state.reader.expect(CALL)
        yield from state.read_series(lambda: self._read_call(state), CALL)
        yield from state.reader.accept_within_call(END)

    def _read_call(self, state: ParserState) -> Steps[None]:
        name = state.checked((yield from self._read_header(state)))
        if not (yield from state.reader.is_next("{")):
            raise Malformed("arguments")
        state.start(name)
        yield from state.stream_object(CALL_END)
        yield from state.reader.accept_within_call(FENCE_END.strip())
        yield from state.reader.accept_within_call(CALL_END)

    def _read_header(self, state: ParserState) -> Steps[str]:
        raise NotImplementedError

    def _section(self, grammar: LarkBuilder, call: Rule, *, between: str, parallel: bool) -> Rule:
        listed = grammar.repeated(call, between=(between,), parallel=parallel)
        return grammar.sequence(listed, END)


class DeepSeekV3ToolParser(_DeepSeek):
    """V3 and R1: the call's type, its name, and the arguments in a Markdown code fence."""

    def _read_header(self, state: ParserState) -> Steps[str]:
        yield from state.reader.read_until(SEPARATOR, limit=MAX_HEADER)
        name = yield from state.reader.read_until("\n", limit=MAX_HEADER)
        yield from state.reader.accept_after_space("```json")
        yield from state.reader.skip_space()
        return name.strip()

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        bodies = [
            grammar.sequence(function.name + FENCE, grammar.json(function.schema), FENCE_END)
            for function in functions
        ]
        call = grammar.sequence(CALL, "function", SEPARATOR, grammar.choice(bodies), CALL_END)
        return self._section(grammar, call, between="\n", parallel=parallel)


class DeepSeekV31ToolParser(_DeepSeek):
    """V3.1: the name and the arguments."""

    def _read_header(self, state: ParserState) -> Steps[str]:
        name = yield from state.reader.read_until(SEPARATOR, limit=MAX_HEADER)
        yield from state.reader.skip_space()
        return name.strip()

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        bodies = [
            grammar.sequence(function.name, SEPARATOR, grammar.json(function.schema))
            for function in functions
        ]
        call = grammar.sequence(CALL, grammar.choice(bodies), CALL_END)
        return self._section(grammar, call, between="", parallel=parallel)
