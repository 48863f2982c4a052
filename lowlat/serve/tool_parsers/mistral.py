"""Mistral's two tool-call formats after [TOOL_CALLS]: a JSON list, or names with arguments."""

import hashlib
import re
import secrets
import string
from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import ParserState

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
ALPHABET = string.ascii_letters + string.digits
ID = re.compile(r"[a-zA-Z0-9]{9}")
MAX_HEADER = 256


class _Mistral(ToolParser):
    opening = CALLS

    def new_id(self) -> str:
        return "".join(secrets.choice(ALPHABET) for _ in range(9))

    def past_id(self, id: str, name: str, number: int) -> str:
        """Templates require ids of nine letters and digits; others are replaced by a hash."""
        if ID.fullmatch(id):
            return id
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


class MistralListToolParser(_Mistral):
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]"""

    markers = (CALLS,)

    def read(self, state: ParserState) -> Steps[None]:
        while (opening := (yield from state.content_until(CALLS))) is not None:
            yield from state.attempt(opening, self._read_list(state))

    def _read_list(self, state: ParserState) -> Steps[None]:
        def one() -> Steps[None]:
            yield from state.reader.skip_space()
            yield from state.read_object_call(until=None)

        yield from state.reader.skip_space()
        yield from state.reader.expect("[")
        yield from state.read_series(one, ",")
        yield from state.reader.accept_within_call("]")

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        items = [
            grammar.sequence(
                f'{{"name": "{function.name}", "arguments": ',
                grammar.json(function.schema),
                "}",
            )
            for function in functions
        ]
        listed = grammar.repeated(grammar.choice(items), between=(", ",), parallel=parallel)
        space = grammar.optional(grammar.literal(" "))
        return grammar.sequence(space, "[", listed, "]")


class MistralToolParser(_Mistral):
    """[TOOL_CALLS]name[ARGS]{...}, with [CALL_ID]id before [ARGS] in some versions."""

    markers = (CALLS, CALL_ID, ARGS)

    def read(self, state: ParserState) -> Steps[None]:
        while (opening := (yield from state.content_until(CALLS))) is not None:
            yield from state.attempt(opening, self._read_call(state))

    def _read_call(self, state: ParserState) -> Steps[None]:
        header = yield from state.reader.read_until(ARGS, limit=MAX_HEADER)
        name, _, id = header.partition(CALL_ID)
        name = state.checked(name.strip())
        yield from state.reader.skip_space()
        if not (yield from state.reader.is_next("{")):
            raise Malformed("arguments")
        state.start(name, id=id if ID.fullmatch(id) else None)
        yield from state.stream_object(None)

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        call = grammar.choice(
            [
                grammar.sequence(function.name, ARGS, grammar.json(function.schema))
                for function in functions
            ]
        )
        return grammar.repeated(call, between=(CALLS,), parallel=parallel)
