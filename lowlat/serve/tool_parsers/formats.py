"""Tool-call formats with JSON arguments: Hermes, Llama 3, Mistral, GigaChat, DeepSeek, Kimi K2."""

import hashlib
import re
import secrets
import string
from abc import abstractmethod
from typing import ClassVar

from lowlat.serve.tool_parsers.base import NAME, ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.quoted_grammar import json_quoted
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import ParserState

ARGUMENTS = "<arguments>"
"""Place of the JSON of the arguments in `call`."""
MAX_HEADER = 256
MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")


class _JsonToolParser(ToolParser):
    call: ClassVar[tuple[str, ...]]
    """The grammar's `body`: texts, in one of them NAME, and ARGUMENTS."""

    def body(self, grammar: LarkBuilder, function: ToolFunction) -> Rule:
        arguments = _arguments(grammar, function)
        texts = [item.replace(NAME, function.name) if NAME in item else item for item in self.call]
        return grammar.sequence(*(arguments if text == ARGUMENTS else text for text in texts))


def _arguments(grammar: LarkBuilder, function: ToolFunction) -> Rule:
    if function.text is None:
        return grammar.json(function.schema)
    return grammar.sequence('{"input": "', grammar.nested(json_quoted(function.text)), '"}')


class HermesToolParser(_JsonToolParser):
    """Hermes, Qwen and others: <tool_call>{"name", "arguments"}</tool_call>."""

    markers = ("<tool_call>", "</tool_call>")
    call = (f'\n{{"name": "{NAME}", "arguments": ', ARGUMENTS, "}\n")
    after_call = ("</tool_call>",)
    between = ("\n", "<tool_call>")

    def read_calls(self, state: ParserState) -> Steps[None]:
        yield from state.reader.skip_space()
        yield from state.read_object_call(until="</tool_call>")
        yield from state.reader.accept_within_call("</tool_call>")


class GigaChat31ToolParser(_JsonToolParser):
    """GigaChat 3.1: <|function_call|>{"name": ..., "arguments": {...}}, one call per message."""

    markers = ("<|function_call|>",)
    parallel = False
    call = (f'{{"name": "{NAME}", "arguments": ', ARGUMENTS, "}")

    def read_calls(self, state: ParserState) -> Steps[None]:
        yield from state.reader.skip_space()
        yield from state.read_object_call(until=None)


class GigaChat3ToolParser(GigaChat31ToolParser):
    """GigaChat 3: the same object as a message of the role "function call"."""

    markers = ("function call", "<|role_sep|>")
    before_call = (markers[1], "\n")

    def read_calls(self, state: ParserState) -> Steps[None]:
        yield from state.reader.accept_after_space(self.markers[1])
        yield from super().read_calls(state)


class Llama3ToolParser(_JsonToolParser):
    """Llama 3.1 and later: {"name": ..., "parameters": {...}} as the whole output.

    The marker may precede it; without it, JSON is a call only if its name is a function of the
    request. Templates accept one call per message; models may write several, with ";".
    """

    markers = ("<|python_tag|>",)
    is_marked = False
    parallel = False
    call = (f'{{"name": "{NAME}", "parameters": ', ARGUMENTS, "}")

    def read_calls(self, state: ParserState) -> Steps[None]:
        def one() -> Steps[None]:
            yield from state.reader.skip_space()
            yield from state.read_object_call(until=None, only_known=True)

        yield from state.read_series(one, ";")


class _Mistral(_JsonToolParser):
    def new_id(self) -> str:
        alphabet = string.ascii_letters + string.digits
        return "".join(secrets.choice(alphabet) for _ in range(9))

    def past_id(self, id: str, name: str, number: int) -> str:
        """Templates require ids of nine letters and digits; others are replaced by a hash."""
        if MISTRAL_ID.fullmatch(id):
            return id
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


class MistralListToolParser(_Mistral):
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]"""

    markers = ("[TOOL_CALLS]",)
    before_calls = (Rule('(" ")?'), "[")
    call = (f'{{"name": "{NAME}", "arguments": ', ARGUMENTS, "}")
    between = (", ",)
    after_calls = ("]",)

    def read_calls(self, state: ParserState) -> Steps[None]:
        def one() -> Steps[None]:
            yield from state.reader.skip_space()
            yield from state.read_object_call(until=None)

        yield from state.reader.skip_space()
        yield from state.reader.expect("[")
        yield from state.read_series(one, ",")
        yield from state.reader.accept_within_call("]")


class MistralToolParser(_Mistral):
    """[TOOL_CALLS]name[ARGS]{...}, with [CALL_ID]id before [ARGS] in some versions."""

    markers = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
    call = (NAME, "[ARGS]", ARGUMENTS)
    between = ("[TOOL_CALLS]",)

    def read_calls(self, state: ParserState) -> Steps[None]:
        header = yield from state.reader.read_until("[ARGS]", limit=MAX_HEADER)
        name, _, id = header.partition("[CALL_ID]")
        yield from state.reader.skip_space()
        yield from state.read_arguments(
            name.strip(), until=None, id=id if MISTRAL_ID.fullmatch(id) else None
        )


class _Section(_JsonToolParser):
    """A section of calls between the first two markers, each call between the next two."""

    fence: ClassVar[str] = ""
    """Text between the arguments and the end of a call, which models may leave out."""

    def read_calls(self, state: ParserState) -> Steps[None]:
        _, end, call, *_ = self.markers
        yield from state.reader.skip_space()
        yield from state.reader.expect(call)
        yield from state.read_series(lambda: self._read_call(state), call)
        yield from state.reader.accept_within_call(end)

    def _read_call(self, state: ParserState) -> Steps[None]:
        name = yield from self.read_header(state)
        yield from state.reader.skip_space()
        call_end = self.markers[3]
        yield from state.read_arguments(name, until=call_end)
        if self.fence:
            yield from state.reader.accept_within_call(self.fence)
        yield from state.reader.accept_within_call(call_end)

    @abstractmethod
    def read_header(self, state: ParserState) -> Steps[str]:
        """Parse a call up to its arguments; returns the function's name."""


class _DeepSeek(_Section):
    markers = (
        "<｜tool▁calls▁begin｜>",  # noqa: RUF001
        "<｜tool▁calls▁end｜>",  # noqa: RUF001
        "<｜tool▁call▁begin｜>",  # noqa: RUF001
        "<｜tool▁call▁end｜>",  # noqa: RUF001
        "<｜tool▁sep｜>",  # noqa: RUF001
    )
    _, end, call_begin, call_end, separator = markers
    json_arguments = True
    needs_content = False
    fence = "```"
    after_call = (call_end,)
    after_calls = (end,)


class DeepSeekV3ToolParser(_DeepSeek):
    """DeepSeek V3 and R1: the call's type, its name, and the arguments in a Markdown code fence."""

    before_call = (_DeepSeek.call_begin, "function", _DeepSeek.separator)
    call = (f"{NAME}\n```json\n", ARGUMENTS, "\n```")
    between = ("\n",)

    def read_header(self, state: ParserState) -> Steps[str]:
        yield from state.reader.read_until(self.separator, limit=MAX_HEADER)
        name = yield from state.reader.read_until("\n", limit=MAX_HEADER)
        yield from state.reader.accept_after_space("```json")
        return name.strip()


class DeepSeekV31ToolParser(_DeepSeek):
    """DeepSeek V3.1: the name and the arguments."""

    before_call = (_DeepSeek.call_begin,)
    call = (NAME, _DeepSeek.separator, ARGUMENTS)

    def read_header(self, state: ParserState) -> Steps[str]:
        return (yield from state.reader.read_until(self.separator, limit=MAX_HEADER)).strip()


class KimiK2ToolParser(_Section):
    """Kimi K2: the id is functions.NAME:NUMBER, with the number of the call in the conversation."""

    markers = (
        "<|tool_calls_section_begin|>",
        "<|tool_calls_section_end|>",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "<|tool_call_argument_begin|>",
    )
    _, end, call_begin, call_end, separator = markers
    before_call = (call_begin,)
    call = (f"functions.{NAME}:", Rule("/[0-9]{1,4}/"), separator, ARGUMENTS)
    after_call = (call_end,)
    after_calls = (end,)

    def past_id(self, id: str, name: str, number: int) -> str:
        return f"functions.{name}:{number}"

    def read_header(self, state: ParserState) -> Steps[str]:
        header = yield from state.reader.read_until(self.separator, limit=MAX_HEADER)
        name, _, number = header.strip().rpartition(":")
        if not number.isdecimal():
            raise Malformed("header")
        return name.removeprefix("functions.")
