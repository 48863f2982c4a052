"""Bad requests: invalid or expensive structured outputs; and hard ones that are served."""

import json
from collections.abc import Iterator
from typing import Any

from lowlat.generate import structured

from .cases import BODIES, CHAT, COMPLETIONS, RESPONSES, Case, bad_field, bad_value, tool

PATTERNS = {
    "a count that is no number": "a{1,99999999999999999999}",
    "nested alternatives": "(" * 300 + "a" + "|b)*" * 300,
    "look-ahead": "(?=a)a",
    "look-behind": "(?<=a)b",
    "a back-reference": r"(a)\1",
    "a named back-reference": r"(?P<x>a)(?P=x)",
    "an open group": "(a",
    "an open class": "[a",
    "nothing to repeat": "*a",
    "an unknown class": r"\p{NoSuchClass}",
    "a lone backslash": "a\\",
    "an atomic group": "(?>a+)b",
    "a condition": "(a)?(?(1)b|c)",
    "characters out of order": "[z-a]",
    "a pattern above the cap": "a" * (structured.MAX_PATTERN_BYTES + 1),
    "an empty pattern": "",
    "deep groups": "(" * 2000 + ")" * 2000,
}

LARK = {
    "no start": 'a: "b"',
    "no such rule": "start: b",
    "a loop": "start: start",
    "no grammar": "\0",
    "an import": "%import python.file_input\nstart: file_input",
    "a file": '%import ..etc.passwd\nstart: "a"',
    "many rules": "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "x"' for i in range(20_000)),
    "a chain of rules": "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(9_000)),
    "deep brackets": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "a schema that is none": "start: %json {",
}  # fmt: skip

SCHEMAS: dict[str, dict[str, Any]] = {
    "no such type": {"type": "no-such-type"},
    "a type that is a number": {"type": 3},
    "an unknown keyword": {"type": "string", "no_such_keyword": 1},
    "if": {"if": {"type": "string"}, "then": {"minLength": 1}},
    "not": {"not": {"type": "string"}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "a reference elsewhere": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference to nothing": {"$ref": "#/$defs/none"},
    "a reference upwards": {"$ref": "../../x#"},
    "properties that are a list": {"type": "object", "properties": []},
    "required that is a text": {"type": "object", "required": "a"},
    "a negative length": {"type": "string", "minLength": -1},
    "lengths that contradict": {"type": "string", "minLength": 3, "maxLength": 2},
    "an unknown format": {"type": "string", "format": "no-such-format"},
    "a pattern that is none": {"type": "string", "pattern": "("},
    "a pattern with look-ahead": {"type": "string", "pattern": "(?=a)"},
    "patterns as names": {"type": "object", "patternProperties": {"(": {}}},
    "a schema above the cap": {"type": "string", "description": "x" * structured.MAX_SCHEMA_BYTES},
    "501 properties": {"type": "object", "properties": {f"p{i}": {} for i in range(501)}},
    "numbers beyond reach": {"type": "number", "minimum": 1e308, "maximum": -1e308},
    "multiples of zero": {"type": "integer", "multipleOf": 0},
    "an empty enum": {"enum": []},
    "an empty anyOf": {"anyOf": []},
}  # fmt: skip


LONGEST = {"regex": structured.MAX_PATTERN_BYTES, "grammar": structured.MAX_GRAMMAR_BYTES}


def deep_schema(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def structured_outputs() -> Iterator[Case]:
    """Schemas, patterns, choices and grammars that are none, or cost too much to compile."""
    field = "structured_outputs"
    for path in (CHAT, COMPLETIONS):
        for kind, table in (("regex", PATTERNS), ("grammar", LARK)):
            for name, text in table.items():
                is_checked_early = not 1 <= len(text) <= LONGEST[kind]
                param = f"{field}.{kind}" if is_checked_early else field
                yield bad_field(f"{path} {kind}: {name}", path, {field: {kind: text}}, param)
        choices = {
            "too many": ["x"] * 1001,
            "none": [],
            "too large together": ["x" * 1024] * 65,
        }
        for name, options in choices.items():
            param = field if name == "too large together" else f"{field}.choice"
            yield bad_field(f"{path} choice: {name}", path, {field: {"choice": options}}, param)
        for name, schema in SCHEMAS.items():
            yield bad_field(f"{path} json: {name}", path, {field: {"json": schema}}, field)
        deep = f"start: %json {json.dumps(deep_schema(65))}"
        yield bad_field(f"{path} grammar: a deep schema", path, {field: {"grammar": deep}}, field)
        body = {**BODIES[path], field: {"json": deep_schema(65)}}
        yield bad_value(f"{path} json: deep", path, lambda body=body: body, words="nested deeper")
    for name, schema in SCHEMAS.items():
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        yield bad_field(
            f"response_format: {name}", CHAT, {"response_format": form}, "response_format"
        )
        flat = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
        yield bad_field(f"text.format: {name}", RESPONSES, {"text": flat}, "text.format")
        if schema.get("type", "object") != "object" or len(schema.get("properties", ())) > 500:
            continue  # forced calls are objects, and their schemas have to fit the prompt
        change = {"tools": [tool("f", **schema)], "tool_choice": "required"}
        yield bad_field(f"forced tool: {name}", CHAT, change, "tools")


RECURSIVE = {"anyOf": [{"$ref": "#/$defs/a"}, {"const": 1}]}
HARD: dict[str, dict[str, Any]] = {
    "(a+)+$": {"regex": "(a+)+$"},
    "(a|a)*b": {"regex": "(a|a)*b"},
    "(.*a){30}": {"regex": "(.*a){30}"},
    "(x+x+)+y": {"regex": "(x+x+)+y"},
    "(a?){50}a{50}": {"regex": "(a?){50}a{50}"},
    "([a-z]+)*=": {"regex": "([a-z]+)*="},
    "many characters": {"regex": r"[\p{L}&&[^\p{Lu}]]{1,200}"},
    "a date that backtracks": {"regex": r"(\d+[-/ ]?)+(\d+)*!"},
    "repeats of repeats": {"regex": "((a{0,1000}){0,1000}){0,1000}"},
    "a huge count": {"regex": "a{100000000}"},
    "a million alternatives": {"regex": "(a|b|ab|ba|aa|bb){20}"},
    "a huge repeat of a rule": {"grammar": 'start: ("a" | "b" "c"){100000000}'},
    "an ambiguous grammar": {"grammar": 'start: start start | "a"'},
    "an ambiguous rule": {"grammar": 'start: s\ns: s s | "x"'},
    "an empty rule": {"grammar": "start:"},
    "a recursive schema": {"json": {"$ref": "#/$defs/a", "$defs": {"a": RECURSIVE}}},
    "a huge length": {"json": {"type": "string", "minLength": 10**9}},
    "a huge array": {"json": {"type": "array", "minItems": 10**9}},
    "a slow pattern in a schema": {"json": {"type": "string", "pattern": "((a{0,99}){0,99}){9}"}},
    "choices with one beginning": {"choice": ["a" * length for length in range(1, 300)]},
    "a thousand choices": {"choice": [f"b{number}" for number in range(1000)]},
}
"""Forms known to take other engines minutes; here they take a moment, or are refused."""
