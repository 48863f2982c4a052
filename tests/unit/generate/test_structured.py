"""Limits of structured outputs, each checked before anything is compiled."""

import json

import pytest

from lowlat.generate import structured
from lowlat.generate.json_schema import MAX_DEPTH, MAX_PROPERTIES, read_schema
from lowlat.generate.structured import Choice, Grammar, JsonSchema, Regex
from lowlat.utils.errors import UserError


def test_texts_up_to_the_limit_are_taken() -> None:
    """Regression: a limit that counts one byte too many."""
    Regex(pattern="a" * structured.MAX_PATTERN_BYTES)
    Grammar(lark="a" * structured.MAX_GRAMMAR_BYTES)
    JsonSchema(schema="a" * structured.MAX_SCHEMA_BYTES)
    Choice(options=("a" * structured.MAX_CHOICE_BYTES,))
    Choice(options=("",) * structured.MAX_CHOICES)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Regex(pattern="é" * (structured.MAX_PATTERN_BYTES // 2) + "a"), "^regex has 4097"),
        (lambda: Regex(pattern=""), "^regex is empty"),
        (lambda: Regex(pattern="\ud800"), "^regex: character 0 is half"),
        (lambda: Grammar(lark="a" * (structured.MAX_GRAMMAR_BYTES + 1)), "^grammar has 262145"),
        (lambda: Grammar(lark=""), "^grammar is empty"),
        (lambda: JsonSchema(schema=" " * (structured.MAX_SCHEMA_BYTES + 1)), "^json_schema has"),
        (lambda: Choice(options=()), "^choice must hold 1 to 1000"),
        (lambda: Choice(options=("a",) * 1001), "^choice must hold 1 to 1000"),
        (lambda: Choice(options=("a" * 1025,)), "^choice has 1025 bytes"),
        (lambda: Choice(options=("a" * 1024,) * 65), "^choice: the texts have 66560 bytes"),
    ],
)
def test_more_is_refused(make, match: str) -> None:
    with pytest.raises(UserError, match=match):
        make()


def nested(levels: int) -> str:
    return '{"anyOf": [' * (levels // 2) + "{}" + "]}" * (levels // 2)


def test_depth_is_bounded() -> None:
    """Regression: a schema that overflows the stack of a recursive function."""
    assert read_schema(nested(MAX_DEPTH - 2), "json_schema")
    for levels in (MAX_DEPTH + 2, 20_000):
        with pytest.raises(UserError, match=r"^json_schema: the (schema|JSON text) is nested"):
            read_schema(nested(levels), "json_schema")


def test_properties_are_bounded() -> None:
    properties = {f"p{index}": {} for index in range(MAX_PROPERTIES)}
    read_schema(json.dumps({"properties": properties}), "json_schema")
    properties["more"] = {}
    for key in ("properties", "patternProperties"):
        with pytest.raises(UserError, match=f"^json_schema: {key} at '#/items' has 501 entries"):
            read_schema(json.dumps({"items": {key: properties}}), "json_schema")


@pytest.mark.parametrize(
    "keyword",
    [
        "not",
        "if",
        "then",
        "else",
        "uniqueItems",
        "contains",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "unevaluatedProperties",
        "additionalItems",
        "nullable",
        "$dynamicRef",
        "$anchor",
        "x-guidance",
        "tpye",
    ],
)
def test_an_unsupported_keyword_is_named(keyword: str) -> None:
    """Regression: a keyword that is dropped, so that outputs break the user's schema."""
    for schema, place in (
        ({keyword: {}}, "#"),
        ({"properties": {"a": {"anyOf": [{keyword: {}}]}}}, "#/properties/a/anyOf/0"),
        ({"$defs": {"x/y": {keyword: {}}}}, "#/$defs/x~1y"),
    ):
        with pytest.raises(UserError) as caught:
            read_schema(json.dumps(schema), "json_schema")
        assert str(caught.value).startswith(f"json_schema: keyword '{keyword}' at '{place}' is not")


def test_names_and_values_are_no_keywords() -> None:
    """Regression: properties called "not", or objects inside enum, taken for keywords."""
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.com/a.json",
        "title": "T",
        "properties": {"not": {"const": {"if": 1}}, "a": {"enum": [{"$ref": "x"}]}},
        "default": {"contains": 1},
    }
    read = read_schema(json.dumps(schema), "json_schema")
    assert read["properties"] == schema["properties"]
    assert "$schema" not in read and "$id" not in read


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:9/schema.json",
        "https://example.com/a.json#/$defs/a",
        "file:///etc/passwd",
        "other.json",
        "#/$defs/missing",
        "#/default",
        "#anchor",
        "",
    ],
)
def test_references_stay_inside_the_schema(target: str) -> None:
    """Regression: a request to an address or a file of the sender's choice."""
    schema = {"$defs": {"a": {}}, "default": {"not": {}}, "items": {"$ref": target}}
    with pytest.raises(UserError, match=r"^json_schema: \$ref .* at '#/items' is not a schema"):
        read_schema(json.dumps(schema), "json_schema")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not valid JSON"),
        ("true", "must hold a JSON object"),
        ("[]", "must hold a JSON object"),
        ('{"minimum": NaN}', "NaN"),
        ('{"minimum": 1e999}', "too large"),
        ('{"a": 1, "a": 2}', "appears twice"),
        ('{"items": [{}]}', "use prefixItems"),
        ('{"properties": []}', "must hold schemas"),
        ('{"anyOf": {}}', "must hold schemas"),
        ('{"properties": {"a": 3}}', "an? int stands at '#/properties/a'"),
        ('{"$ref": 3}', r"\$ref '3'"),
    ],
)
def test_what_is_no_schema_is_refused(text: str, match: str) -> None:
    with pytest.raises(UserError, match="^json_schema: .*" + match):
        read_schema(text, "json_schema")
