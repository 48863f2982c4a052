"""Arguments without JSON: which schemas can be enforced and which are rejected."""

import json
from collections.abc import Iterable
from typing import Any

import pytest

from lowlat.generate.grammar import CompiledGrammar, GrammarCompiler
from lowlat.serve.chat.constraints import ToolCallConstraint, constrained_output
from lowlat.serve.chat.output_parser import OutputParser, ReasoningTags
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.parameters import json_types
from lowlat.serve.tool_parsers.state import ParserState, ToolCallArguments
from lowlat.serve.tool_parsers.xml import MAX_VALUE, GlmToolParser, Qwen3CoderToolParser
from tests.unit.serve.parsing import joined_parts
from tests.unit.serve.templates import tokenizer_of
from tests.unit.serve.test_constrained_output import accepts

TOKENIZER = tokenizer_of("chatml")
FORMATS = (GlmToolParser(), Qwen3CoderToolParser())
IDS = [type(tools).__name__ for tools in FORMATS]
PLACE = "tools[0].function.parameters"
CITY = {"city": {"type": "string"}}
UNIT = {"unit": {"enum": ["C", "F"]}}
CHAIN = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 4} for i in range(40)}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)


def grammar_of(tools: ToolParser, schema: dict[str, Any], compiler: GrammarCompiler) -> Any:
    function = ToolFunction(name="f", schema={"type": "object", **schema}, path=PLACE)
    calls = ToolCallConstraint(format=tools, functions=[function], parallel=True, required=True)
    output = constrained_output(TOKENIZER, output=None, calls=calls)
    assert output is not None
    return compiler.compile(output)


def written(tools: ToolParser, *pairs: tuple[str, str]) -> str:
    if isinstance(tools, GlmToolParser):
        texts = [f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in pairs]
        return f"<tool_call>f\n{''.join(texts)}</tool_call>"
    texts = [f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in pairs]
    return f"<tool_call>\n<function=f>\n{''.join(texts)}</function>\n</tool_call>"


def arguments(tools: ToolParser, schema: dict[str, Any], text: str) -> Any:
    marks = ReasoningTags("<think>", "</think>")
    parser = OutputParser(marks=marks, thinking="never", tools=tools, schemas={"f": schema})
    parts = [*parser.push(text), *parser.finish()]
    return json.loads("".join(p.text for p in parts if isinstance(p, ToolCallArguments)))


def cuts(text: str, size: int) -> tuple[list[str], list[str]]:
    """The text in one piece, and in pieces of `size`."""
    return [text], [text[at : at + size] for at in range(0, len(text), size)]


def parts_of(tools: ToolParser, schema: dict[str, Any], pieces: Iterable[str]) -> list[Any]:
    """The joined parts of an answer that arrives as `pieces`."""
    parser = OutputParser(tools=tools, calls=ParserState({"f": schema}, lambda: "id"))
    return joined_parts(parser, pieces)


def assert_read(tools: ToolParser, schema: dict[str, Any], text: str, value: object) -> None:
    """One call with arguments `value`, however the text is cut."""
    whole, *others = [
        parts_of(tools, schema, cut) for size in (1, 2, 7) for cut in cuts(text, size)
    ]
    assert all(other == whole for other in others)
    (arguments,) = [part for part in whole if isinstance(part, ToolCallArguments)]
    assert json.loads(arguments.text) == value


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "if": ({"properties": CITY, "if": {"required": ["city"]}}, ".if"),
    "not": ({"properties": CITY, "not": {"required": ["city"]}}, ".not"),
    "anyOf": ({"properties": CITY, "anyOf": [{"required": ["city"]}]}, ".anyOf"),
    "allOf": ({"properties": CITY, "allOf": [{"required": ["city"]}]}, ".allOf"),
    "oneOf": ({"properties": CITY, "oneOf": [{"required": ["city"]}]}, ".oneOf"),
    "enum": ({"enum": [{"city": "Bern"}]}, ".enum"),
    "const": ({"const": {"city": "Bern"}}, ".const"),
    "propertyNames": ({"propertyNames": {"pattern": "^x"}}, ".propertyNames"),
    "patternProperties": ({"patternProperties": {"^x": {}}}, ".patternProperties"),
    "unevaluated": ({"unevaluatedProperties": False}, ".unevaluatedProperties"),
    "dependentRequired": ({"dependentRequired": {"city": ["day"]}}, ".dependentRequired"),
    "dependentSchemas": ({"dependentSchemas": {"city": {}}}, ".dependentSchemas"),
    "minProperties": ({"properties": CITY, "minProperties": 1}, ".minProperties"),
    "maxProperties": ({"properties": CITY | UNIT, "maxProperties": 1}, ".maxProperties"),
    "maxProperties of any": ({"maxProperties": 9}, ".maxProperties"),
    "a type": ({"type": "string"}, ".type"),
    "required": ({"required": "city"}, ".required"),
    "what is not allowed": ({"required": ["x"], "additionalProperties": False}, ".required"),
    "never": ({"properties": {"x": False}, "required": ["x"]}, ".required"),
    "a reference elsewhere": ({"$ref": "http://127.0.0.1/x"}, ".$ref"),
    "a reference to itself": ({"$ref": "#"}, ".$ref"),
    "a circle": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, ".$ref"),
    "more than a reference": (
        {"$ref": "#/$defs/a", "properties": CITY, "$defs": {"a": {"type": "object"}}}, ".$ref"
    ),
    "a reference to the whole": ({"properties": {"x": {"$ref": "#"}}}, ".properties.x.$ref"),
    "a reference beside": (
        {"properties": CITY | {"x": {"items": {"$ref": "#/properties/city"}}}},
        ".properties.x.items.$ref",
    ),
    "not inside": ({"properties": {"x": {"type": "string", "not": {"const": "a"}}}}, ""),
    "pattern": ({"properties": {"x": {"type": "string", "pattern": "a"}}}, ".properties.x.pattern"),
    "format": ({"properties": {"x": {"type": "string", "format": "date"}}}, ".properties.x.format"),
    "texts that exclude each other": (
        {"properties": {"x": {"type": "string", "oneOf": [{"const": "a"}, {"maxLength": 1}]}}},
        ".properties.x.oneOf",
    ),
    "a pattern by reference": (
        {
            "properties": {"x": {"$ref": "#/$defs/a"}},
            "$defs": {"a": {"type": "string", "pattern": "a"}},
        },
        ".properties.x.pattern",
    ),
    "no text": (
        {"properties": {"x": {"type": "string", "enum": ["abc"], "maxLength": 2}}},
        ".properties.x.enum",
    ),
    "lengths": (
        {"properties": {"x": {"type": "string", "minLength": 3, "maxLength": 2}}},
        ".properties.x.minLength",
    ),
    "a name with a space at its end": ({"properties": {"x ": {}}}, ".properties.x "),
}  # fmt: skip


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_name(
    tools: ToolParser, name: str, compiler: GrammarCompiler
) -> None:
    """Regression: forced calls that the function's own schema refuses."""
    schema, inside = REFUSED[name]
    with pytest.raises(RequestError) as caught:
        grammar_of(tools, schema, compiler)
    assert caught.value.status == 400
    assert caught.value.param == PLACE + inside
    assert caught.value.message.startswith(f"{PLACE}{inside}: ")


Pairs = list[tuple[str, str]]
ENFORCED: dict[str, tuple[dict[str, Any], list[Pairs], list[Pairs]]] = {
    "lengths": (
        {"properties": {"x": {"type": "string", "minLength": 2, "maxLength": 4}}},
        [[], [("x", "ab")], [("x", "a<\n>")]],
        [[("x", "a")], [("x", "abcde")], [("x", "")]],
    ),
    "a least length": (
        {"properties": {"x": {"type": "string", "minLength": 30}}},
        [[("x", "a" * 30)], [("x", "a" * 99)], [("x", "a" * 30 + "</b>")]],
        [[("x", "a" * 29)], [("x", "a" * 29 + "\n")], [("x", "b"), ("x", "c" * 40)]],
    ),
    "not empty": (
        {"properties": {"x": {"type": "string", "minLength": 1, "maxLength": 2000}}},
        [[("x", "a")], [("x", "<b>\n" * 500)]],
        [[("x", "")], [("x", "\n")], [("x", "a" * 2001)]],
    ),
    "one length": (
        {"properties": {"x": {"type": "string", "minLength": 2, "maxLength": 2}}},
        [[("x", "ab")]],
        [[("x", "a")], [("x", "abc")], [("x", "<a")]],
    ),
    "no length": (
        {"properties": {"x": {"type": "string", "maxLength": 0}}}, [[("x", "")]], [[("x", "a")]]
    ),
    "a constant": ({"properties": {"x": {"const": "a b"}}}, [[("x", "a b")]], [[("x", "a")]]),
    "texts of a length": (
        {"properties": {"x": {"enum": ["a", "bc", 1], "type": "string", "minLength": 2}}},
        [[("x", "bc")]],
        [[("x", "a")], [("x", "1")]],
    ),
    "one text or another": (
        {"properties": {"x": {"anyOf": [{"const": "a"}, {"type": "string", "minLength": 3}]}}},
        [[("x", "a")], [("x", "abc")]],
        [[("x", "ab")]],
    ),
    "a text or null": (
        {"properties": {"x": {"anyOf": [{"enum": ["a", "5"]}, {"type": "null"}]}}},
        [[("x", '"a"')], [("x", '"5"')], [("x", "null")]],
        [[("x", "a")], [("x", "5")], [("x", '"b"')]],
    ),
    "texts by reference": (
        {"properties": {"x": {"$ref": "#/$defs/u"}}, "$defs": {"u": UNIT["unit"]}},
        [[("x", "C")]],
        [[("x", '"C"')], [("x", "K")]],
    ),
    "a function by reference": (
        {"$ref": "#/$defs/f", "$defs": {"f": {"properties": UNIT, "required": ["unit"]}}},
        [[("unit", "C")]],
        [[], [("unit", "K")]],
    ),
    "definitions of its own": (
        {
            "properties": {"x": {"$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}}},
            "$defs": {"a": {"type": "integer"}},
        },
        [[("x", "5")]],
        [[("x", "null")]],
    ),
    "no others": ({"properties": CITY}, [[], [("city", "a")]], [[("x", "5")]]),
    "others of a type": (
        {"properties": CITY, "additionalProperties": {"type": "integer"}},
        [[("x", "5")], [("city", "Bern"), ("x", "5"), ("y", "6")]],
        [[("x", "a")], [("x", "1"), ("city", "Bern")]],
    ),
    "texts as others": (
        {"additionalProperties": {"type": "string", "maxLength": 2}},
        [[], [("x", "12"), ("city", "ab")]],
        [[("x", "123")]],
    ),
    "anything": ({}, [[], [("x", "Bern"), ("y", "[1]")]], [[("a b", "1")]]),
    "required and not listed": (
        {"properties": {}, "required": ["x"]},
        [[("x", "Bern")]],
        [[], [("y", "Bern")]],
    ),
    "one that may not be": ({"properties": {"x": False} | CITY}, [[("city", "a")]], [[("x", "1")]]),
    "any value": ({"properties": {"x": {"description": "?"}}}, [[("x", "Bern")], [("x", "5")]], []),
    "numbers that the names keep": (
        {"properties": UNIT, "required": ["unit"], "minProperties": 1, "maxProperties": 1},
        [[("unit", "C")]],
        [[]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
@pytest.mark.parametrize("name", ENFORCED)
def test_what_can_be_enforced_is(tools: ToolParser, name: str, compiler: GrammarCompiler) -> None:
    schema, good, bad = ENFORCED[name]
    grammar: CompiledGrammar = grammar_of(tools, schema, compiler)
    for pairs in good:
        assert accepts(grammar, written(tools, *pairs)), pairs
    for pairs in bad:
        assert not accepts(grammar, written(tools, *pairs)), pairs


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
@pytest.mark.parametrize(
    ("schema", "raw", "value"),
    [
        ({"properties": {"x": {"type": "string"}}}, '"5"', '"5"'),
        ({"properties": {"x": {"type": ["string", "null"]}}}, '"5"', "5"),
        ({"properties": {"x": {"type": ["string", "null"]}}}, "5", "5"),
        ({"properties": {"x": {"type": ["string", "null"]}}}, "null", None),
        ({"properties": {"x": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"const": "5"}}}, "5", "5"),
        ({"additionalProperties": {"type": "string"}}, "5", "5"),
        ({"$ref": "#/$defs/f", "$defs": {"f": {"properties": {"x": {"const": "5"}}}}}, "5", "5"),
        ({"properties": []}, "5", 5),
        ({"properties": {"x": {"type": 3, "anyOf": "a", "$ref": "#/$defs"}}}, "5", 5),
        ({"properties": {"x": {"$ref": "#/$defs/a0"}}, "$defs": CHAIN}, "5", 5),
    ],
)  # fmt: skip
def test_values_are_read_by_their_schema(
    tools: ToolParser, schema: dict[str, Any], raw: str, value: object
) -> None:
    """Regression: quotes of JSON inside a text; also of schemas that nothing was promised of."""
    assert arguments(tools, schema, written(tools, ("x", raw))) == {"x": value}


TEXT_OR_NULL = {"type": ["string", "null"]}
ENDS = ("</arg_value>", "</parameter>", "</tool_call>", "</function>", "<tool_call>", "<arg_key>")
NESTED: dict[str, tuple[dict[str, Any], str, Any]] = {
    "an object": ({"type": "object"}, '{"a": "x%sy"}', {"a": "x%sy"}),
    "an array": ({"type": "array"}, '["%s", {"b": ["%s"]}]', ["%s", {"b": ["%s"]}]),
    "a key": ({"type": "object"}, '{"%s": 1}', {"%s": 1}),
    "after a quote": ({"type": "object"}, '{"a": "\\"%s\\\\"}', {"a": '"%s\\'}),
    "lines": ({"type": "object"}, '{\n "a":\n "%s"\n}', {"a": "%s"}),
    "a text in quotes": (TEXT_OR_NULL, '"%s"', "%s"),
    "any value": ({}, '{"a": "%s"}', {"a": "%s"}),
}


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
@pytest.mark.parametrize("name", NESTED)
@pytest.mark.parametrize("end", ENDS)
def test_an_end_inside_a_string_of_json_is_text(tools: ToolParser, name: str, end: str) -> None:
    """Regression: values that are cut where a string of theirs looks like their end."""
    kind, raw, value = NESTED[name]
    schema = {"properties": {"x": kind, "y": {"type": "integer"}}}
    written_out = written(tools, ("x", raw.replace("%s", end)), ("y", "5"))
    wanted = {"x": json.loads(json.dumps(value).replace("%s", end)), "y": 5}
    assert_read(tools, schema, written_out + "\nDone.", wanted)


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
@pytest.mark.parametrize(
    "raw",
    ['{"a": "', '{"a": 1', "[1, ", '["a" "b"]', '"a', '"a" b', "{a}", '{"a": "\nb"}', "[" * 200],
)
def test_what_is_no_json_ends_at_the_first_end(tools: ToolParser, raw: str) -> None:
    """Also where what follows would complete it."""
    schema = {"properties": {"x": {"type": ["object", "array", "string"]}}}
    written_out = written(tools, ("x", raw), ("y", '"}'), ("z", '"}]'))
    assert_read(tools, schema, written_out + 'Done "}', {"x": raw, "y": '"}', "z": '"}]'})


@pytest.mark.slow
def test_a_value_above_the_limit_is_none() -> None:
    """However it is cut: a call that is not read to its end is passed on as it is."""
    raw = json.dumps({"a": "x" * MAX_VALUE})
    whole, pieces = (
        parts_of(GlmToolParser(), {}, cut)
        for cut in cuts(written(GlmToolParser(), ("x", raw)), 1 << 18)
    )
    assert whole == pieces and "<arg_value>" in whole[-1].text


def test_many_references_take_a_moment(compiler: GrammarCompiler) -> None:
    """Regression: references to references that are followed once for each way there."""
    chain = {**CHAIN, "a40": {"type": "string"}, "a39": {"$ref": "#/$defs/a40"}}
    schema = {"properties": {"x": {"$ref": "#/$defs/a30"}}, "$defs": chain}
    assert json_types({"$ref": "#/$defs/a30"}, schema) == {"string"}
    assert accepts(
        grammar_of(GlmToolParser(), schema, compiler), written(GlmToolParser(), ("x", "Bern"))
    )
