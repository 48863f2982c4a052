"""Tool calls of Llama 3.1 and later: {"name": ..., "parameters": {...}} as the whole output.

"<|python_tag|>" may precede it. Without the tag, JSON is a call only if its name is a function of
the request.
"""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import ParserState

TAG = "<|python_tag|>"


class Llama3ToolParser(ToolParser):
    """Bare JSON. Templates accept one call per message; models may write several, with ";"."""

    markers = (TAG,)
    opening = ""
    parallel = False

    def read(self, state: ParserState) -> Steps[None]:
        opening = yield from state.reader.accept_after_space("", keep="{")
        if opening is not None:
            yield from state.attempt(opening, self._read_calls(state))
        while (opening := (yield from state.content_until(TAG))) is not None:
            yield from state.attempt(opening, self._read_calls(state))

    def _read_calls(self, state: ParserState) -> Steps[None]:
        def one() -> Steps[None]:
            yield from state.reader.skip_space()
            yield from state.read_object_call(until=None, only_known=True)

        yield from state.read_series(one, ";")

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        return grammar.choice(
            [
                grammar.sequence(
                    f'{{"name": "{function.name}", "parameters": ',
                    grammar.json(function.schema),
                    "}",
                )
                for function in functions
            ]
        )
