"""Objects without additionalProperties are closed in forced output, and blanks are bounded."""

import json
from typing import Any

import pytest

from lowlat.generate.grammar import GrammarCompiler, GrammarError
from lowlat.generate.json_schema import WHITESPACE, read_schema
from lowlat.generate.structured import Grammar, JsonObject, JsonSchema, StructuredOutput
from tests.fakes import byte_tokenizer

ONE = {"type": "object", "properties": {"a": {"type": "integer"}}}
TWO = {"type": "object", "properties": {"b": {"type": "integer"}}}
FREE = {"type": "object"}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    tokenizer = byte_tokenizer()
    return GrammarCompiler(tokenizer, tokenizer.vocab_size)


def accepts(compiler: GrammarCompiler, output: StructuredOutput, text: str) -> bool:
    state = compiler.compile(output).start()
    try:
        for byte in text.encode():
            state.accept(byte)
    except GrammarError:
        return False
    return state.is_done


def takes(compiler: GrammarCompiler, schema: dict[str, Any], value: object) -> bool:
    """Whether the value is an output for `schema`, alone and inside a Lark grammar."""
    found = [
        accepts(compiler, output, json.dumps(value))
        for output in (
            JsonSchema(schema=json.dumps(schema)),
            Grammar(lark=f"start: %json {json.dumps(schema)}"),
        )
    ]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    "schema",
    [
        ONE,
        {"$ref": "#/$defs/one", "$defs": {"one": ONE}},
        {"anyOf": [ONE, {"type": "null"}]},
        {"allOf": [{"$ref": "#/$defs/one"}], "$defs": {"one": ONE}},
        {**ONE, "required": ["a"]},
    ],
    ids=["plain", "reference", "alternative", "a single allOf", "required"],
)
def test_declared_properties_are_all(compiler: GrammarCompiler, schema: dict[str, Any]) -> None:
    """Regression: small models that invent one property after the other."""
    assert takes(compiler, schema, {"a": 1})
    assert not takes(compiler, schema, {"a": 1, "x": 1})
    outer = {"type": "object", "properties": {"in": {"type": "array", "items": schema}}}
    if "$defs" in schema:
        outer = {"$defs": schema["$defs"], **outer}
        outer["properties"]["in"]["items"] = {k: v for k, v in schema.items() if k != "$defs"}
    assert takes(compiler, outer, {"in": [{"a": 1}]})
    assert not takes(compiler, outer, {"in": [{"a": 1, "x": 1}]})


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (FREE, {"x": 1}),
        ({**FREE, "properties": {}}, {"x": 1}),
        ({"type": "object", "properties": {"a": FREE}}, {"a": {"x": {"y": 1}}}),
        ({**ONE, "additionalProperties": True}, {"a": 1, "x": 1}),
        ({**ONE, "additionalProperties": {"type": "null"}}, {"a": 1, "x": None}),
        ({"allOf": [ONE, TWO]}, {"a": 1, "b": 2}),
        ({**ONE, "allOf": [TWO]}, {"a": 1, "b": 2}),
        ({**ONE, "anyOf": [TWO, {"required": ["a"]}]}, {"a": 1, "b": 2}),
        ({"allOf": [ONE, {"$ref": "#/$defs/two"}], "$defs": {"two": TWO}}, {"a": 1, "b": 2}),
        ({"allOf": [ONE, {"anyOf": [TWO, True]}]}, {"a": 1, "b": 2}),
        ({**ONE, "required": ["x"]}, {"x": 1}),
    ],
    ids=[
        "no properties", "empty properties", "inner", "allowed", "allowed by schema", "allOf",
        "own and allOf", "own and anyOf", "composed reference", "nested composition",
        "a required name",
    ],
)  # fmt: skip
def test_what_stays_open(compiler: GrammarCompiler, schema: dict[str, Any], value: object) -> None:
    assert accepts(compiler, JsonSchema(schema=json.dumps(schema)), json.dumps(value))


def test_the_schema_itself_is_not_changed_elsewhere() -> None:
    schema = {"const": {"properties": {"a": 1}}, "enum": [{"properties": {"a": 1}}]}
    assert read_schema(json.dumps(schema), "x") == {
        **schema, "x-guidance": {"whitespace_pattern": WHITESPACE},
    }  # fmt: skip


@pytest.mark.parametrize(
    "output",
    [
        JsonObject(),
        JsonSchema(schema=json.dumps(FREE)),
        JsonSchema(schema=json.dumps(ONE)),
        Grammar(lark=f"start: %json {json.dumps(ONE)}"),
    ],
    ids=["object", "free schema", "schema", "in a grammar"],
)
def test_white_space_is_bounded(compiler: GrammarCompiler, output: StructuredOutput) -> None:
    """Between all parts; a model that begins to write blanks must go on at some time."""
    parts = ("{", '"a"', ":", "1", "}")
    for place in range(1, len(parts)):
        for blank, fits in (("\n    ", True), ("\n" * 3, False), (" " * 30, False), ("\t", False)):
            text = "".join(parts[:place]) + blank + "".join(parts[place:])
            assert accepts(compiler, output, text) == fits, text
    assert not accepts(compiler, output, '{"a":1} ')
