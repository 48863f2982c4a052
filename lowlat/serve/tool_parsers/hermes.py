"""Tool calls of Hermes, Qwen and others: <tool_call>{"name", "arguments"}</tool_call>."""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import ParserState

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class HermesToolParser(ToolParser):
    """JSON between tags, one pair of tags per call."""

    markers = (OPEN, CLOSE)
    opening = OPEN

    def read(self, state: ParserState) -> Steps[None]:
        while (opening := (yield from state.content_until(OPEN))) is not None:
            yield from state.attempt(opening, self._read_call(state))

    def _read_call(self, state: ParserState) -> Steps[None]:
        yield from state.reader.skip_space()
        yield from state.read_object_call(until=CLOSE)
        yield from state.reader.accept_within_call(CLOSE)

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        bodies = [
            grammar.sequence(
                f'\n{{"name": "{function.name}", "arguments": ',
                grammar.json(function.schema),
                "}\n",
            )
            for function in functions
        ]
        call = grammar.sequence(grammar.choice(bodies), CLOSE)
        return grammar.repeated(call, between=("\n", OPEN), parallel=parallel)
