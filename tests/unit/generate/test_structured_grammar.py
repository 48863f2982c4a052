"""Grammar masks: the allowed outputs are valid, for any tokenizer."""

import json
import random
import re

import jsonschema_rs
import pytest
import torch

from lowlat.generate.grammar import GrammarCompiler, GrammarError
from lowlat.generate.structured import (
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuredOutput,
)
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer

from .grammar_walk import (
    Walker,
    allowed,
    stripping_tokenizer,
    texts,
    uneven_tokenizer,
)

PADDING = 7
UNEVEN = uneven_tokenizer()
STRIPPING = stripping_tokenizer()

LIST = {
    "type": "object",
    "properties": {
        "value": {"type": "integer", "minimum": -20, "exclusiveMaximum": 300},
        "next": {"anyOf": [{"$ref": "#/$defs/list"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}
SCHEMAS = {
    "recursive": {"$defs": {"list": LIST}, "$ref": "#/$defs/list"},
    "escaped reference": {
        "$defs": {"a/b~c %": {"type": "boolean"}},
        "type": "array",
        "items": {"$ref": "#/$defs/a~1b~0c%20%25"},
        "maxItems": 3,
    },
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 4},
            "kind": {"enum": ["é", 'a"\\b\n', None, [1, {"k": 2.5}]]},
            "size": {"type": "number", "exclusiveMinimum": -1.5, "maximum": 2.25},
        },
        "required": ["kind"],
        "additionalProperties": {"type": "integer", "multipleOf": 7},
        "minProperties": 1,
    },
    "patterns": {
        "type": "object",
        "patternProperties": {"^x[0-9]{2}$": {"type": "string", "pattern": "^[a-cé]+\\d$"}},
        "additionalProperties": False,
    },
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": ["null", "string"], "maxLength": 2}, {"const": {"a": [1]}}],
        "items": {"type": "integer"},
        "minItems": 1,
        "maxItems": 4,
    },
    "one of": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "x"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"const": "y"}}, "required": ["k"]},
        ],
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"format": "date", "type": "string"}}, "required": ["b"]},
        ]
    },
}
OUTPUTS = [
    JsonObject(),
    *(JsonSchema(schema=json.dumps(schema)) for schema in SCHEMAS.values()),
    Regex(pattern="(é|😀x|[ab]){1,5}/?\\d*"),
    Choice(options=("", "ab", "abé", "😀", 'x"\x00\x7f')),
    Grammar(lark='start: "é"+ tail?\ntail: "ab" %json {"type": "boolean"}'),
]


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(UNEVEN, UNEVEN.vocab_size + PADDING)


@pytest.fixture(scope="module")
def stripping() -> GrammarCompiler:
    return GrammarCompiler(STRIPPING, STRIPPING.vocab_size)


def outputs(compiler: GrammarCompiler, output: StructuredOutput) -> list[str]:
    tokenizer = UNEVEN
    found = list(texts(compiler.compile(output), tokenizer))
    assert len(set(found)) > 1
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_outputs_are_valid_by_their_schema(compiler: GrammarCompiler, name: str) -> None:
    validator = jsonschema_rs.Draft202012Validator(SCHEMAS[name], validate_formats=True)
    for text in outputs(compiler, JsonSchema(schema=json.dumps(SCHEMAS[name]))):
        validator.validate(json.loads(text))


def test_any_object_is_an_object(compiler: GrammarCompiler) -> None:
    assert all(isinstance(json.loads(text), dict) for text in outputs(compiler, JsonObject()))


@pytest.mark.parametrize("pattern", ["(é|😀x|[ab]){1,5}/?\\d*", "^a\n[/\\]é]+$", "(?i)abé|(?s:.)x"])
def test_outputs_match_their_pattern(compiler: GrammarCompiler, pattern: str) -> None:
    for text in outputs(compiler, Regex(pattern=pattern)):
        assert re.fullmatch(pattern, text), text


def test_outputs_are_among_the_choices(compiler: GrammarCompiler) -> None:
    options = ("", "ab", "abé", "😀", 'x"\x00\x7f', "[a]*", "//", "\\")
    assert set(outputs(compiler, Choice(options=options))) <= set(options)


def test_every_choice_can_be_reached(compiler: GrammarCompiler) -> None:
    options = ("", "ab", 'x"\x00\x7f', "é/\\n", "a" * 300)
    grammar = compiler.compile(Choice(options=options))
    for text in options:
        state = grammar.start()
        for byte in text.encode():
            state.accept(byte)
        assert state.mask()[min(UNEVEN.eos_ids)]


def test_outputs_follow_their_grammar(compiler: GrammarCompiler) -> None:
    lark = 'start: pair+ %json {"const": [1]}\npair: "(" pair? ")" // nested\n'
    for text in outputs(compiler, Grammar(lark=lark)):
        brackets, _, value = text.partition("[")
        assert json.loads("[" + value) == [1]
        while "()" in brackets:
            brackets = brackets.replace("()", "")
        assert brackets == ""


@pytest.mark.parametrize("output", OUTPUTS, ids=lambda output: type(output).__name__)
def test_masks_and_accept_agree(compiler: GrammarCompiler, output: StructuredOutput) -> None:
    """Regression: a mask that allows a token that cannot be accepted, or bans one that can."""
    grammar = compiler.compile(output)
    walker, rng = Walker(UNEVEN, 3), random.Random(5)
    state, taken = grammar.start(), []
    for _ in range(60):
        mask = state.mask()
        good = torch.nonzero(mask).flatten().tolist()
        bad = torch.nonzero(~mask).flatten().tolist()
        for token in rng.sample(good, min(4, len(good))):
            other = grammar.start()
            for earlier in taken:
                other.accept(earlier)
            other.accept(token)
        for token in rng.sample(bad, min(8, len(bad))):
            with pytest.raises(GrammarError, match=f"token {token}"):
                state.accept(token)
        assert torch.equal(state.mask(), mask)
        token = walker.choose(good)
        state.accept(token)
        taken.append(token)
        if token in UNEVEN.eos_ids:
            return


def test_every_end_is_allowed_where_the_output_may_end(compiler: GrammarCompiler) -> None:
    """Regression: a second end-of-sequence id that is hidden, or allowed too early."""
    grammar = compiler.compile(Regex(pattern="ab|abé"))
    ends = sorted(UNEVEN.eos_ids)
    assert len(ends) == 2
    for end in ends:
        state = grammar.start()
        assert not set(allowed(state)) & set(ends)
        state.accept(ord("a"))
        assert not set(allowed(state)) & set(ends)
        state.accept(ord("b"))
        assert not state.is_done and set(ends) <= set(allowed(state))
        state.accept(end)
        assert state.is_done and allowed(state) == ends
        state.accept(end)
        with pytest.raises(GrammarError, match="not allowed"):
            state.accept(ord("a"))


def test_done_when_nothing_may_follow(compiler: GrammarCompiler) -> None:
    state = compiler.compile(Choice(options=("a", "é"))).start()
    state.accept(0xC3)
    assert not state.is_done
    state.accept(0xA9)
    assert state.is_done and allowed(state) == sorted(UNEVEN.eos_ids)


def test_characters_may_be_spread_over_tokens(compiler: GrammarCompiler) -> None:
    """Regression: tokens that end in the middle of a character, or begin there, refused."""
    state = compiler.compile(Regex(pattern="éé+x?")).start()
    for piece in (b"\xc3", b"\xa9\xc3", b"\xa9x"):
        token = next(i for i in range(UNEVEN.vocab_size) if UNEVEN.id_to_bytes(i) == piece)
        assert token in allowed(state)
        state.accept(token)
    assert state.is_done


def test_ids_without_a_token_are_never_allowed(compiler: GrammarCompiler) -> None:
    """Regression: padding rows chosen where a grammar allows any token at all."""
    for output in (Grammar(lark="start: <[*]>+"), Regex(pattern="(?s:.*)"), JsonObject()):
        mask = compiler.compile(output).start().mask()
        assert mask.dtype == torch.bool and mask.shape == (UNEVEN.vocab_size + PADDING,)
        assert not mask[-PADDING:].any() and mask.any()


def test_a_vocabulary_smaller_than_the_tokenizer() -> None:
    """Regression: masks longer than the logits."""
    compiler = GrammarCompiler(UNEVEN, 200)
    state = compiler.compile(Regex(pattern="[aé]")).start()
    assert allowed(state) == [ord("a"), 0xC3]
    state.accept(ord("a"))
    # Both ends lie beyond the last row.
    assert state.is_done and not state.mask().any()


def test_special_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    """Regression: "<tool>" the token taken for its characters, which decoding leaves out."""
    tool = UNEVEN.encode("<tool>")[0]
    state = compiler.compile(Choice(options=("<tool>",))).start()
    assert allowed(state) == [ord("<")]
    assert tool in allowed(compiler.compile(Grammar(lark='start: <tool> "a"')).start())


def test_white_space_is_bounded(compiler: GrammarCompiler) -> None:
    """Regression: a model that writes blanks forever."""
    for output in (JsonObject(), Grammar(lark='start: %json {"type": "object"}')):
        state = compiler.compile(output).start()
        state.accept(ord("{"))
        state.accept(ord("\n"))
        count = 0
        while ord(" ") in allowed(state):
            state.accept(ord(" "))
            count += 1
            assert count < 100
        assert count == 24
        assert {UNEVEN.id_to_bytes(token)[:1] for token in allowed(state)} == {b'"', b"}"}


def test_the_space_that_decoding_drops_is_extra(stripping: GrammarCompiler) -> None:
    """Regression: outputs that lose their own first space, or cannot begin with U+2581 tokens."""
    for options in ((" a", "  b"), ("ab", "{"), ("",)):
        grammar = stripping.compile(Choice(options=options))
        assert set(texts(grammar, STRIPPING)) <= set(options)
    first = stripping.compile(JsonObject()).start().mask()
    assert {STRIPPING.id_to_bytes(i) for i in torch.nonzero(first).flatten().tolist()} == {
        *(b" ", b" {", b"{", b'{"')
    }
    for text in texts(stripping.compile(JsonObject()), STRIPPING, seeds=10):
        assert json.loads(text) is not None and text.startswith("{")


def test_equal_tokens_give_equal_masks(compiler: GrammarCompiler) -> None:
    """Regression: masks that depend on what was compiled or followed before."""
    output = JsonSchema(schema=json.dumps(SCHEMAS["object"]))
    ids = Walker(UNEVEN, 1).walk(compiler.compile(output))
    assert ids is not None
    fresh = GrammarCompiler(UNEVEN, UNEVEN.vocab_size + PADDING)
    grammar = compiler.compile(output)
    states = [grammar.start(), grammar.start(), fresh.compile(output).start()]
    for token in ids:
        masks = [state.mask() for state in states]
        assert all(torch.equal(mask, masks[0]) for mask in masks)
        for state in states:
            state.accept(token)


def test_the_byte_tokenizer_will_do() -> None:
    tokenizer = byte_tokenizer()
    grammar = GrammarCompiler(tokenizer, 263).compile(Regex(pattern="[0-9]{3}"))
    assert {len(text) for text in texts(grammar, tokenizer)} == {3}


@pytest.mark.parametrize(
    ("output", "match"),
    [
        (Regex(pattern="(?=a)b"), "^regex: .*look-around"),
        (Regex(pattern="(a)\\1"), "^regex: .*backreferences"),
        (Regex(pattern="(a"), "^regex: .*unclosed group"),
        (Regex(pattern="a\\"), "^regex: "),
        (Regex(pattern="[^\\s\\S]"), "^regex: no text satisfies it"),
        (JsonSchema(schema='{"$ref": "#"}'), "^json_schema: no text satisfies it"),
        (JsonSchema(schema='{"type": "strin"}'), "^json_schema: Invalid type: strin"),
        (JsonSchema(schema='{"type": "string", "format": "color"}'), "^json_schema: .*color"),
        (JsonSchema(schema='{"minimum": 5, "maximum": 3, "type": "integer"}'), "^json_schema: "),
        (
            JsonSchema(
                schema='{"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 2}]}'
            ),
            "^json_schema: alternatives of oneOf may overlap; use anyOf",
        ),
        (Grammar(lark="start: a"), "^grammar: "),
        (Grammar(lark="begin: /a/"), "^grammar: "),
        (Grammar(lark="start: @other"), "^grammar: "),
        (Grammar(lark='{"grammars": []}'), "^grammar: "),
        (Grammar(lark="%import .secret\nstart: /a/"), "^grammar: "),
        (Grammar(lark='start: %json {"not": {}}'), "^grammar: %json: keyword 'not' at '#'"),
        (Grammar(lark='start: %json {"$ref": "http://a/b"}'), r"^grammar: %json: \$ref"),
        (Grammar(lark="start: %json {"), "^grammar: %json needs a JSON object"),
        (Grammar(lark="start: a\na[temperature=0.5]: /b/"), "^grammar: option 'temperature'"),
        (Grammar(lark='start: a\na[stop="x"]: /b/'), "^grammar: option 'stop'"),
        (Grammar(lark="%llguidance {}\nstart: /a/"), "^grammar: %llguidance"),
    ],
)
def test_errors_name_the_field(
    compiler: GrammarCompiler, output: StructuredOutput, match: str
) -> None:
    with pytest.raises(UserError, match=match) as caught:
        compiler.compile(output)
    assert "\n" not in str(caught.value)


def test_strings_and_comments_hold_no_options(compiler: GrammarCompiler) -> None:
    """Regression: an option or directive seen inside a string, a pattern or a comment."""
    lark = 'start: "stop=" /temperature=%json{1}/ "%llguidance" # stop=1\n// %json'
    state = compiler.compile(Grammar(lark=lark)).start()
    for byte in b"stop=temperature=%json%llguidance":
        state.accept(byte)
    assert state.is_done
