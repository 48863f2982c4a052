"""Tool calls of MiniCPM3: Python calls with keyword arguments, in a Markdown code fence."""

import ast
import json
import keyword
import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.parameters import (
    ToolParameter,
    ToolParameters,
    json_schema,
    read_parameters,
    schema_error,
)
from lowlat.serve.tool_parsers.reader import IncrementalReader, Malformed, Steps
from lowlat.serve.tool_parsers.state import ParserState

MAX_NAME = 256
MAX_CODE = 1 << 16
"""Longest call that is parsed, in characters."""
JSON_NAMES = {"true": True, "false": False, "null": None}
"""Names that models write for Python's constants."""
SEPARATOR = ", "


class MiniCPM3ToolParser(ToolParser):
    """MiniCPM3: <|tool_call_start|>, then one call per line between ```python and ```."""

    markers = ("<|tool_call_start|>", "<|tool_call_end|>")
    fence: ClassVar[str] = "```"
    before_calls = (f"\n{fence}python\n",)
    between = ("\n",)
    after_calls = (f"\n{fence}\n", markers[1])

    def read_calls(self, state: ParserState) -> Steps[None]:
        yield from state.reader.accept_after_space(f"{self.fence}python")
        yield from self._read_call(state)
        while not (yield from self._is_over(state.reader)):
            if not (yield from state.attempt("", self._read_call(state))):
                return

    def _is_over(self, reader: IncrementalReader) -> Steps[bool]:
        """Consume the end of the calls; False if another call follows."""
        yield from reader.accept_within_call(self.fence)
        if (yield from reader.accept_within_call(self.markers[1])):
            return True
        yield from reader.skip_space()
        return not (yield from reader.has_more())

    def _read_call(self, state: ParserState) -> Steps[None]:
        """Emit the next call. Truncated or malformed arguments are emitted unchanged, so that they
        do not look complete.
        """
        yield from state.reader.skip_space()
        name = yield from state.reader.read_until("(", limit=MAX_NAME)
        state.start(state.checked(name.strip()))
        scanner, code = _CallScanner(), ""
        while not scanner.is_done and (yield from state.reader.has_more()):
            count = scanner.scan(state.reader.unread)
            code += state.reader.unread[:count]
            state.reader.skip(count)
        try:
            state.arguments(arguments_as_json(f"f({code}"))
        except Malformed:
            state.arguments(code)

    def body(self, grammar: LarkBuilder, function: ToolFunction) -> Rule:
        parameters = read_parameters(function.schema, function.path)
        return grammar.sequence(f"{function.name}(", *_arguments(grammar, parameters), ")")


class _CallScanner:
    """Finds the end of a call's arguments: the ")" outside of brackets and strings."""

    def __init__(self) -> None:
        self.is_done = False
        self._depth = 1
        self._quote = ""
        self._is_escaped = False

    def scan(self, text: str) -> int:
        """The number of characters of `text` that belong to the call."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._quote:
                self._is_escaped = character == "\\"
                if character == self._quote:
                    self._quote = ""
            elif character in "\"'":
                self._quote = character
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
                if not self._depth:
                    self.is_done = True
                    return index + 1
        return len(text)


def arguments_as_json(call: str) -> str:
    """The keyword arguments of a Python call as JSON text.

    Raises Malformed for other code, and for values that are not literals.
    """
    if len(call) > MAX_CODE:
        raise Malformed("arguments")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings
            node = ast.parse(call, mode="eval").body
        match node:
            case ast.Call(func=ast.Name(), args=[], keywords=keywords):
                return _json({_name(item): _value(item.value) for item in keywords})
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Malformed("arguments") from error
    raise Malformed("arguments")


def _name(item: ast.keyword) -> str:
    if item.arg is None:
        raise Malformed("arguments")
    return item.arg


def _value(node: ast.expr) -> Any:
    """The value of a literal."""
    match node:
        case ast.Constant(value=str() | bool() | int() | None as value):
            return value
        case ast.Constant(value=float() as value) if math.isfinite(value):
            return value
        case ast.Name(id=name) if name in JSON_NAMES:
            return JSON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_value(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            names = [key.value if isinstance(key, ast.Constant) else None for key in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_value, values), strict=True))
    raise Malformed("value")


def _json(values: dict[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates
        return json.dumps(values)
    return text


def _arguments(grammar: LarkBuilder, parameters: ToolParameters) -> list[Rule]:
    """The grammar of keyword arguments: listed ones in order, then any others."""
    listed = [(p, _pair(grammar, p, parameters)) for p in parameters.listed]
    rest: list[Rule] = []
    firsts: list[Rule] = []
    if parameters.others is not None:
        other = _other(grammar, parameters)
        rest = [grammar.any_number(grammar.sequence(SEPARATOR, other))]
        firsts = [grammar.sequence(other, *rest)]
    is_optional = True
    for parameter, pair in reversed(listed):
        first = grammar.sequence(pair, *rest)
        following = grammar.sequence(SEPARATOR, pair)
        if parameter.is_required:
            firsts, is_optional = [first], False
        else:
            firsts = [first, *firsts]
            following = grammar.optional(following)
        rest = [grammar.sequence(following, *rest)]
    if not firsts:
        return []
    choice = grammar.choice(firsts)
    return [grammar.optional(choice) if is_optional else choice]


def _pair(grammar: LarkBuilder, parameter: ToolParameter, parameters: ToolParameters) -> Rule:
    name = parameter.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise schema_error(
            parameter.path, "this model writes Python calls; use an identifier as the name"
        )
    value = grammar.json(json_schema(parameter.schema, parameters.root))
    return grammar.sequence(grammar.quoted(f"{name}="), value)


def _other(grammar: LarkBuilder, parameters: ToolParameters) -> Rule:
    """An argument that the schema does not list."""
    assert parameters.others is not None
    taken: Sequence[str] = [parameter.name for parameter in parameters.listed]
    banned = "|".join([*taken, *keyword.kwlist])
    name = grammar.pattern(f"/[a-zA-Z_][a-zA-Z0-9_]{{0,63}}/ & ~/{banned}/")
    value = grammar.json(json_schema(parameters.others.schema, parameters.root))
    return grammar.sequence(name, "=", value)
