"""Mistral's two ways of writing calls after [TOOL_CALLS]: a JSON list, and names with arguments."""

import hashlib
import re
import secrets
import string
from collections.abc import Sequence

from lowlat.serve.tool_parsers.base import Function, ToolFormat
from lowlat.serve.tool_parsers.lark import Lark, Rule
from lowlat.serve.tool_parsers.reader import Malformed, Steps
from lowlat.serve.tool_parsers.state import Calls

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
ALPHABET = string.ascii_letters + string.digits
ID = re.compile(r"[a-zA-Z0-9]{9}")
MAX_HEADER = 256


class _Mistral(ToolFormat):
    opening = CALLS

    def new_id(self) -> str:
        return "".join(secrets.choice(ALPHABET) for _ in range(9))

    def past_id(self, id: str, name: str, number: int) -> str:
        """Templates refuse ids other than nine letters and digits: they get one made of `id`."""
        if ID.fullmatch(id):
            return id
        return hashlib.sha256(id.encode("utf-8", "surrogatepass")).hexdigest()[:9]


class MistralList(_Mistral):
    """[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]"""

    markers = (CALLS,)

    def read(self, calls: Calls) -> Steps[None]:
        while (opening := (yield from calls.content_until(CALLS))) is not None:
            yield from calls.attempt(opening, self._read_list(calls))

    def _read_list(self, calls: Calls) -> Steps[None]:
        def one() -> Steps[None]:
            yield from calls.reader.skip_space()
            yield from calls.read_object_call(until=None)

        yield from calls.reader.skip_space()
        yield from calls.reader.expect("[")
        yield from calls.read_series(one, ",")
        yield from calls.reader.accept_within_call("]")

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        items = [
            grammar.sequence(
                f'{{"name": "{function.name}", "arguments": ',
                grammar.json(function.schema),
                "}",
            )
            for function in functions
        ]
        listed = grammar.repeated(grammar.choice(items), between=(", ",), several=several)
        space = grammar.optional(grammar.literal(" "))
        return grammar.sequence(space, "[", listed, "]")


class MistralNames(_Mistral):
    """[TOOL_CALLS]name[ARGS]{...}, with [CALL_ID]id before [ARGS] in some versions."""

    markers = (CALLS, CALL_ID, ARGS)

    def read(self, calls: Calls) -> Steps[None]:
        while (opening := (yield from calls.content_until(CALLS))) is not None:
            yield from calls.attempt(opening, self._read_call(calls))

    def _read_call(self, calls: Calls) -> Steps[None]:
        header = yield from calls.reader.read_until(ARGS, limit=MAX_HEADER)
        name, _, id = header.partition(CALL_ID)
        name = calls.checked(name.strip())
        yield from calls.reader.skip_space()
        if not (yield from calls.reader.is_next("{")):
            raise Malformed("arguments")
        calls.start(name, id=id if ID.fullmatch(id) else None)
        yield from calls.stream_object(None)

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        call = grammar.choice(
            [
                grammar.sequence(function.name, ARGS, grammar.json(function.schema))
                for function in functions
            ]
        )
        return grammar.repeated(call, between=(CALLS,), several=several)
