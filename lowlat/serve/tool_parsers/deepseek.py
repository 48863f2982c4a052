"""DeepSeek's calls, in a section of their own: the form of V3 and R1, and the one of V3.1."""

from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import Function, ToolFormat
from lowlat.serve.tool_parsers.lark import Lark, Rule
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import Calls

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"  # noqa: RUF001
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"  # noqa: RUF001
SEPARATOR = "<｜tool▁sep｜>"  # noqa: RUF001
FENCE, FENCE_END = "\n```json\n", "\n```"
MAX_HEADER = 256


class _DeepSeek(ToolFormat):
    markers = (BEGIN, END, CALL, CALL_END, SEPARATOR)
    opening = BEGIN
    text_arguments = True
    needs_content = False

    def read(self, calls: Calls) -> Steps[None]:
        while (opening := (yield from calls.content_until(BEGIN))) is not None:
            yield from calls.attempt(opening, self._read_section(calls))

    def _read_section(self, calls: Calls) -> Steps[None]:
        yield from calls.reader.skip_space()
        yield from calls.reader.expect(CALL)
        yield from calls.read_series(lambda: self._read_call(calls), CALL)
        yield from calls.reader.accept_within_call(END)

    def _read_call(self, calls: Calls) -> Steps[None]:
        name = calls.checked((yield from self._read_header(calls)))
        if not (yield from calls.reader.is_next("{")):
            raise Malformed("arguments")
        calls.start(name)
        yield from calls.stream_object(CALL_END)
        yield from calls.reader.accept_within_call(FENCE_END.strip())
        yield from calls.reader.accept_within_call(CALL_END)

    def _read_header(self, calls: Calls) -> Steps[str]:
        raise NotImplementedError

    def _section(self, grammar: Lark, call: Rule, *, between: str, several: bool) -> Rule:
        listed = grammar.repeated(call, between=(between,), several=several)
        return grammar.sequence(listed, END)


class DeepSeekFenced(_DeepSeek):
    """The call's type, its name, and the arguments in a fence of Markdown."""

    def _read_header(self, calls: Calls) -> Steps[str]:
        yield from calls.reader.read_until(SEPARATOR, limit=MAX_HEADER)
        name = yield from calls.reader.read_until("\n", limit=MAX_HEADER)
        yield from calls.reader.accept_after_space("```json")
        yield from calls.reader.skip_space()
        return name.strip()

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        bodies = [
            grammar.sequence(function.name + FENCE, grammar.json(function.schema), FENCE_END)
            for function in functions
        ]
        call = grammar.sequence(CALL, "function", SEPARATOR, grammar.choice(bodies), CALL_END)
        return self._section(grammar, call, between="\n", several=several)


class DeepSeekPlain(_DeepSeek):
    """The name, and the arguments."""

    def _read_header(self, calls: Calls) -> Steps[str]:
        name = yield from calls.reader.read_until(SEPARATOR, limit=MAX_HEADER)
        yield from calls.reader.skip_space()
        return name.strip()

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        bodies = [
            grammar.sequence(function.name, SEPARATOR, grammar.json(function.schema))
            for function in functions
        ]
        call = grammar.sequence(CALL, grammar.choice(bodies), CALL_END)
        return self._section(grammar, call, between="", several=several)
