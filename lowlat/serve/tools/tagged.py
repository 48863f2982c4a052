"""Arguments written one by one between tags, without JSON's quotes: GLM's and Qwen3-Coder's calls.

Whether "5" is text or a number is then in the function's schema alone.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lowlat.serve.tools.base import Function, ToolFormat
from lowlat.serve.tools.calls import Calls
from lowlat.serve.tools.lark import Lark, Rule
from lowlat.serve.tools.reader import Malformed, Steps

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MAX_NAME = 256
MAX_VALUE = 1 << 20
KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


class _Tagged(ToolFormat):
    opening = OPEN

    def read(self, calls: Calls) -> Steps[None]:
        while (opening := (yield from calls.content_until(OPEN))) is not None:
            yield from calls.attempt(opening, self._read_call(calls))

    def _read_call(self, calls: Calls) -> Steps[None]:
        name = calls.checked((yield from self._read_name(calls)))
        calls.start(name)
        schema, comma = calls.schemas.get(name, {}), "{"
        while True:
            calls.reader.mark()
            try:
                argument = yield from self._read_argument(calls)
            except Malformed:
                # Cut off or broken: passed on as it is, so that nobody takes it for whole.
                calls.reader.rewind()
                yield from calls.pass_broken(CLOSE)
                return
            calls.reader.release()
            if argument is None:
                break
            key, raw = argument
            value = to_json(raw, _property(schema, key))
            calls.arguments(f"{comma}{json.dumps(key, ensure_ascii=False)}: {value}")
            comma = ", "
        calls.arguments("{}" if comma == "{" else "}")
        yield from self._read_end(calls)

    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        bodies = [self._body(grammar, function) for function in functions]
        call = grammar.sequence(grammar.choice(bodies), CLOSE)
        return grammar.repeated(call, between=("\n", OPEN), several=several)

    def _body(self, grammar: Lark, function: Function) -> Rule:
        raise NotImplementedError

    def _read_name(self, calls: Calls) -> Steps[str]:
        raise NotImplementedError

    def _read_argument(self, calls: Calls) -> Steps[tuple[str, str] | None]:
        raise NotImplementedError

    def _read_end(self, calls: Calls) -> Steps[None]:
        raise NotImplementedError


class Glm(_Tagged):
    """<tool_call>name, then <arg_key> and <arg_value> for each argument."""

    markers = (OPEN, CLOSE, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def _read_name(self, calls: Calls) -> Steps[str]:
        name = yield from calls.reader.read_before("<", limit=MAX_NAME)
        after = yield from calls.reader.is_next("<arg_key>")
        if not after and not (yield from calls.reader.is_next(CLOSE)):
            raise Malformed("arguments")
        return name.strip()

    def _read_argument(self, calls: Calls) -> Steps[tuple[str, str] | None]:
        reader = calls.reader
        if (yield from reader.accept_after_space("<arg_key>")) is None:
            return None
        key = yield from reader.read_until("</arg_key>", limit=MAX_NAME)
        yield from reader.skip_space()
        yield from reader.expect("<arg_value>")
        value = yield from reader.read_until("</arg_value>", limit=MAX_VALUE)
        return key.strip(), value

    def _read_end(self, calls: Calls) -> Steps[None]:
        yield from calls.reader.accept_after_space(CLOSE)

    def _body(self, grammar: Lark, function: Function) -> Rule:
        pairs: list[str] = []
        for key, schema, is_required in properties(function.schema):
            tags = "<arg_key>", grammar.quoted(key), "</arg_key>", "\n", "<arg_value>"
            pair = grammar.sequence(*tags, value_rule(grammar, schema, "</arg_value>"), "\n")
            pairs.append(pair if is_required else grammar.optional(pair))
        return grammar.sequence(function.name + "\n", *pairs)


class QwenCoder(_Tagged):
    """<function=name> inside <tool_call>, then <parameter=key> for each argument."""

    markers = (OPEN, CLOSE)

    def _read_name(self, calls: Calls) -> Steps[str]:
        yield from calls.reader.skip_space()
        yield from calls.reader.expect("<function=")
        return (yield from calls.reader.read_until(">", limit=MAX_NAME)).strip()

    def _read_argument(self, calls: Calls) -> Steps[tuple[str, str] | None]:
        if (yield from calls.reader.accept_after_space("<parameter=")) is None:
            return None
        key = yield from calls.reader.read_until(">", limit=MAX_NAME)
        value = yield from calls.reader.read_until("</parameter>", limit=MAX_VALUE)
        return key.strip(), value.removeprefix("\n").removesuffix("\n")

    def _read_end(self, calls: Calls) -> Steps[None]:
        yield from calls.reader.accept_after_space("</function>")
        yield from calls.reader.accept_after_space(CLOSE)

    def _body(self, grammar: Lark, function: Function) -> Rule:
        pairs: list[str] = []
        for key, schema, is_required in properties(function.schema):
            value = value_rule(grammar, schema, "</parameter>", before_end="\n")
            pair = grammar.sequence(f"<parameter={key}>\n", value, "\n")
            pairs.append(pair if is_required else grammar.optional(pair))
        return grammar.sequence(f"\n<function={function.name}>\n", *pairs, "</function>\n")


def to_json(raw: str, schema: Mapping[str, Any]) -> str:
    """JSON text for `raw`, as the model wrote it: by `schema`, else by what it looks like."""
    kinds = set(_kinds(schema))
    try:
        value = json.loads(raw)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps(raw, ensure_ascii=False)
    kind = KINDS.get(type(value), "array" if isinstance(value, list) else "object")
    fits = kind in kinds or (kind == "integer" and "number" in kinds)
    if fits and kind != "string":
        return raw.strip()
    if "string" in kinds:
        return json.dumps(raw, ensure_ascii=False)
    return raw.strip()


def _kinds(schema: Mapping[str, Any]) -> Iterator[str]:
    """The types that `schema` allows, as far as it says so."""
    declared = schema.get("type", [])
    yield from [declared] if isinstance(declared, str) else declared
    for value in [*schema.get("enum", []), *([schema["const"]] if "const" in schema else [])]:
        yield KINDS.get(type(value), "array" if isinstance(value, list) else "object")
    for option in [*schema.get("anyOf", []), *schema.get("oneOf", [])]:
        if isinstance(option, Mapping):
            yield from _kinds(option)


def _property(schema: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = schema.get("properties", {}).get(key, {})
    return found if isinstance(found, Mapping) else {}


def properties(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Name, schema and whether it is required, of every property of the object in `schema`."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    required = schema.get("required", [])
    for key in schema.get("properties", {}):
        yield key, {**shared, **_property(schema, key)}, key in required


def value_rule(grammar: Lark, schema: Mapping[str, Any], end: str, *, before_end: str = "") -> Rule:
    """A value and `end`: JSON, or text that does not hold `end`; `before_end` stands between."""
    if set(_kinds(schema)) != {"string"}:
        return grammar.sequence(grammar.json(schema), before_end, end)
    if options := [value for value in schema.get("enum", []) if isinstance(value, str)]:
        texts = grammar.choice([grammar.quoted(value) for value in options])
        return grammar.sequence(texts, before_end, end)
    return grammar.text_until(end)
