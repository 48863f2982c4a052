"""<tool_call>{"name": ..., "arguments": {...}}</tool_call>: the way of Hermes, Qwen and others."""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import Function, ToolFormat
from lowlat.serve.tool_parsers.lark import Lark, Rule
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import Calls

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolFormat):
    """JSON between tags, one pair of tags for each call."""

    markers = (OPEN, CLOSE)
    opening = OPEN

    def read(self, calls: Calls) -> Steps[None]:
        while (opening := (yield from calls.content_until(OPEN))) is not None:
            yield from calls.attempt(opening, self._read_call(calls))

    def _read_call(self, calls: Calls) -> Steps[None]:
        yield from calls.reader.skip_space()
        yield from calls.read_object_call(until=CLOSE)
        yield from calls.reader.accept_within_call(CLOSE)

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        bodies = [
            grammar.sequence(
                f'\n{{"name": "{function.name}", "arguments": ',
                grammar.json(function.schema),
                "}\n",
            )
            for function in functions
        ]
        call = grammar.sequence(grammar.choice(bodies), CLOSE)
        return grammar.repeated(call, between=("\n", OPEN), several=several)
