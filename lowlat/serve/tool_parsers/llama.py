"""{"name": ..., "parameters": {...}}, which is all of an answer, as Llama 3.1 and later write it.

A "<|python_tag|>" may come before it. Without one, only the names of the request's own functions
tell a call from other JSON.
"""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import Function, ToolFormat
from lowlat.serve.tool_parsers.lark import Lark, Rule
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import Calls

TAG = "<|python_tag|>"


class Llama(ToolFormat):
    """Bare JSON; the templates take one call an answer, models write more with ";" between."""

    markers = (TAG,)
    opening = ""
    several = False

    def read(self, calls: Calls) -> Steps[None]:
        opening = yield from calls.reader.accept_after_space("", keep="{")
        if opening is not None:
            yield from calls.attempt(opening, self._read_calls(calls))
        while (opening := (yield from calls.content_until(TAG))) is not None:
            yield from calls.attempt(opening, self._read_calls(calls))

    def _read_calls(self, calls: Calls) -> Steps[None]:
        def one() -> Steps[None]:
            yield from calls.reader.skip_space()
            yield from calls.read_object_call(until=None, only_known=True)

        yield from calls.read_series(one, ";")

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
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
