"""The output parser gives the same parts for every chunking of a text."""

import itertools
import json
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.serve.chat.output_parser import OutputParser, ReasoningMode, ReasoningTags
from lowlat.serve.tool_parsers.base import ToolParser
from lowlat.serve.tool_parsers.formats import (
    DeepSeekV3ToolParser,
    HermesToolParser,
    Llama3ToolParser,
    MistralToolParser,
)
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    ParserState,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)
from lowlat.serve.tool_parsers.xml import GlmToolParser
from tests.unit.serve.parsing import joined_parts
from tests.unit.serve.templates import FORMATS, IDS

MARKS = ReasoningTags("<think>", "</think>")
SCHEMAS = {
    "f": {"type": "object", "properties": {"a": {"type": "string"}, "n": {"type": "integer"}}},
    "g": {"type": "object", "properties": {}},
}
DS = DeepSeekV3ToolParser.markers


def parse(
    pieces: Iterable[str], *, tools: ToolParser | None = None, thinking: ReasoningMode = "never"
) -> list[Part]:
    """The joined parts of an answer that arrives as `pieces`; calls have the ids 0, 1, ..."""
    counter = itertools.count()
    calls = ParserState(SCHEMAS, lambda: str(next(counter)))
    parser = OutputParser(marks=MARKS, thinking=thinking, tools=tools, calls=calls)
    parts = joined_parts(parser, pieces)
    assert parser.has_tool_calls == any(isinstance(part, ToolCallStart) for part in parts)
    return parts


def call(index: int, name: str, arguments: str) -> list[Part]:
    return [ToolCallStart(index, str(index), name), ToolCallArguments(index, arguments)]


# Two calls, f with text that needs escapes and g without arguments, after content.
TWO_CALLS = {
    "HermesToolParser": (
        'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": "x\\"}<", "n": [5, {}]}}'
        '\n</tool_call>\n<tool_call>\n{"arguments": {}, "name": "g"}\n</tool_call>\n'
    ),
    "Llama3ToolParser": (
        '{"name": "f", "parameters": {"a": "x\\"}<", "n": [5, {}]}}; '
        '{"type": "function", "name": "g", "parameters": {}}'
    ),
    "MistralListToolParser": (
        'Well.[TOOL_CALLS] [{"name": "f", "arguments": {"a": "x\\"}<", "n": [5, {}]}}, '
        '{"name": "g", "arguments": {}, "id": "123456789"}]'
    ),
    "MistralToolParser": (
        'Well.[TOOL_CALLS]f[ARGS]{"a": "x\\"}<", "n": [5, {}]}[TOOL_CALLS]g[ARGS]{}'
    ),
    "DeepSeekV3ToolParser": (
        f'Well.{DS[0]}{DS[2]}function{DS[4]}f\n```json\n{{"a": "x\\"}}<", "n": [5, {{}}]}}\n```'
        f"{DS[3]}\n{DS[2]}function{DS[4]}g\n```json\n{{}}\n```{DS[3]}{DS[1]}"
    ),
    "DeepSeekV31ToolParser": (
        f'Well.{DS[0]}{DS[2]}f{DS[4]}{{"a": "x\\"}}<", "n": [5, {{}}]}}{DS[3]}'
        f"{DS[2]}g{DS[4]}{{}}{DS[3]}{DS[1]}"
    ),
    "KimiK2ToolParser": (
        "Well.<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
        '<|tool_call_argument_begin|>{"a": "x\\"}<", "n": [5, {}]}<|tool_call_end|>'
        "<|tool_call_begin|>functions.g:1<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    ),
    "GigaChat3ToolParser": (
        "Well.\n\nfunction call<|role_sep|>\n"
        '{"name": "f", "arguments": {"a": "x\\"}<", "n": [5, {}]}}'
        '\n\nfunction call<|role_sep|>\n{"name": "g", "arguments": {}}'
    ),
    "GigaChat31ToolParser": (
        'Well.<|function_call|>{"name": "f", "arguments": {"a": "x\\"}<", "n": [5, {}]}}'
        '<|function_call|>{"arguments": {}, "name": "g"}'
    ),
    "MiniCPM3ToolParser": (
        'Well.\n<|tool_call_start|>\n```python\nf(a="x\\"}<", n=[5, {}])\ng()\n```\n'
        "<|tool_call_end|>"
    ),
    "GlmToolParser": (
        'Well.\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x"}<</arg_value>\n<arg_key>n</arg_key>'
        "\n<arg_value>[5, {}]</arg_value>\n</tool_call>\n<tool_call>g\n</tool_call>"
    ),
    "Qwen3CoderToolParser": (
        'Well.\n<tool_call>\n<function=f>\n<parameter=a>\nx"}<\n</parameter>\n<parameter=n>\n'
        "[5, {}]\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n"
        "</tool_call>"
    ),
}


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_every_format_is_parsed(tools: ToolParser) -> None:
    parts = parse([TWO_CALLS[type(tools).__name__]], tools=tools)
    if not isinstance(tools, Llama3ToolParser):
        assert parts.pop(0) == ContentPart("Well.")
    assert parts == [*call(0, "f", '{"a": "x\\"}<", "n": [5, {}]}'), *call(1, "g", "{}")]


def test_where_reasoning_begins_and_ends() -> None:
    """By the marks, not by what is shown: line ends are held back."""
    pieces = ["<thi", "nk>", "\n", "a", "\n\n", "</thi", "nk>", "\n", "b"]
    for thinking, known in (("maybe", "none"), ("begun", "begun")):
        parser = OutputParser(marks=MARKS, thinking=thinking)
        states = [parser.reasoning]
        for piece in pieces:
            parser.push(piece)
            states.append(parser.reasoning)
        assert states == [known, known, *["begun"] * 5, "over", "over", "over"]
    assert OutputParser(marks=MARKS, thinking="never").reasoning == "none"
    assert OutputParser(marks=None, thinking="begun").reasoning == "none"


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_character_by_character_is_the_same(tools: ToolParser) -> None:
    """Regression: decisions that depend on where a piece of the text ended."""
    text = TWO_CALLS[type(tools).__name__]
    assert parse(text, tools=tools) == parse([text], tools=tools)


def fragments(tools: ToolParser) -> st.SearchStrategy[str]:
    """Texts made of the format's markers, pieces of its calls, JSON and harmless text."""
    text = TWO_CALLS[type(tools).__name__]
    pieces = [
        *tools.markers, *(marker[:-1] for marker in tools.markers), text, text[: len(text) // 2],
        text[len(text) // 3 :], "a", " ", "\n", "{", "}", '"', '{"name": "f", ', "\\", ",", "]",
        '"arguments": {}', '"parameters": {"a": 1', ": tru", "[", "e", "\x01", "functions.f:3", "f",
        "<think>", "</think>", "<", ";", "```json\n", "<arg_key>", "<function=f>", "<parameter=a>",
        '"x": [1, {"y": null}], ', '"arguments": "{\\"a\\": 1}"}', "\ud7ff", "-0.5e3", "1.", "é",
    ]  # fmt: skip
    return st.lists(st.sampled_from(pieces), max_size=9).map("".join)


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
@pytest.mark.parametrize("thinking", ["never", "maybe", "begun"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_split_gives_the_same_parts(
    tools: ToolParser, thinking: ReasoningMode, data: st.DataObject
) -> None:
    text = data.draw(fragments(tools))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert parse(pieces, tools=tools, thinking=thinking) == parse(
        [text], tools=tools, thinking=thinking
    )


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_text_without_a_call_is_content(tools: ToolParser, data: st.DataObject) -> None:
    """Regression: broken calls, and texts about calls, that lose a character."""
    text = data.draw(fragments(tools))
    parts = parse([text], tools=tools)
    if not any(isinstance(part, ToolCallStart) for part in parts):
        assert parts == ([ContentPart(text)] if text else [])


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_prefixes_lose_nothing(tools: ToolParser) -> None:
    """Regression: an answer cut off by max_tokens whose last piece disappears."""
    text = TWO_CALLS[type(tools).__name__]
    for size in range(len(text)):
        parts = parse([text[:size]], tools=tools)
        names = [part.name for part in parts if isinstance(part, ToolCallStart)]
        if not names:
            assert "".join(p.text for p in parts if isinstance(p, ContentPart)) == text[:size]
        assert names in ([], ["f"], ["f", "g"])


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_plain_text_is_not_held_back(tools: ToolParser) -> None:
    """Regression: a stream that stands still until a word, a line or the answer is complete."""
    calls = ParserState(SCHEMAS, lambda: "id")
    parser = OutputParser(tools=tools, calls=calls)
    shown = ""
    for char in "Some text, a < b [c] {d}.":
        shown += "".join(part.text for part in parser.push(char) if isinstance(part, ContentPart))
    assert shown == "Some text, a < b [c] {d}."


def test_arguments_stream() -> None:
    """Regression: a call that appears only when it is complete."""
    calls = ParserState(SCHEMAS, lambda: "id")
    parser = OutputParser(tools=HermesToolParser(), calls=calls)
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push('{"a": "lon') == [
        ToolCallStart(0, "id", "f"),
        ToolCallArguments(0, '{"a": "lon'),
    ]
    assert parser.push("g te") == [ToolCallArguments(0, "g te")]
    assert parser.push('xt"}') == [ToolCallArguments(0, 'xt"}')]
    assert parser.push("}\n</tool_call>") == []
    assert parser.finish() == []


BROKEN = [
    "<tool_call>\nprint(1)\n</tool_call>",
    "<tool_call>\n{'name': 'f'}\n</tool_call>",
    '<tool_call>{"name": "not a name", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": null}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    "  <tool_call>\n\n</tool_call>  ",
    "<tool_call><tool_call></tool_call>",
]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_calls_are_content(text: str) -> None:
    assert parse([text], tools=HermesToolParser()) == [ContentPart(text)]


def test_a_call_after_a_broken_one_is_found() -> None:
    """Regression: a search that continues after the malformed call instead of inside it."""
    good = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    parts = parse([f"<tool_call> {good}"], tools=HermesToolParser())
    assert parts == [ContentPart("<tool_call>"), *call(0, "g", "{}")]


def test_broken_arguments_come_as_they_are() -> None:
    """Regression: half of a call as arguments and the other half as text for the user."""
    text = '<tool_call>{"name": "f", "arguments": {"a": oops}}</tool_call> then'
    assert parse([text], tools=HermesToolParser()) == [
        *call(0, "f", '{"a": oops}}'),
        ContentPart(" then"),
    ]


def test_a_missing_bracket_does_not_spoil_a_call() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "x"}\n</tool_call>'
    assert parse([text], tools=HermesToolParser()) == call(0, "f", '{"a": "x"}')


def test_line_ends_in_strings_become_escapes() -> None:
    """Regression: arguments no client can read, of models that write code into them."""
    text = '<tool_call>{"name": "f", "arguments": {"a": "x\n\ty"}}</tool_call>'
    (_, arguments) = parse([text], tools=HermesToolParser())
    assert isinstance(arguments, ToolCallArguments)
    assert json.loads(arguments.text) == {"a": "x\n\ty"}


def test_arguments_inside_a_string_are_unpacked() -> None:
    text = '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"x\\"}"}</tool_call>'
    assert parse([text], tools=HermesToolParser()) == call(0, "f", '{"a": "x"}')


def test_content_around_calls_is_kept() -> None:
    call_text = '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    parts = parse([f"\nbefore \n{call_text}\n after\n{call_text}\n\n"], tools=HermesToolParser())
    assert parts == [
        ContentPart("\nbefore"),
        *call(0, "g", "{}"),
        ContentPart("\n after"),
        *call(1, "g", "{}"),
    ]


def test_json_without_a_known_function_is_content_for_llama() -> None:
    """Regression: JSON answers taken for calls."""
    for text in ['{"name": "h", "parameters": {}}', '{"city": "Bern"}', "{", ' {"name": "f"']:
        assert parse([text], tools=Llama3ToolParser()) == [ContentPart(text)]
    tagged = '<|python_tag|>{"name": "f", "parameters": {}}'
    assert parse([tagged], tools=Llama3ToolParser()) == call(0, "f", "{}")
    code = "<|python_tag|>search.call(query=5)"
    assert parse([code], tools=Llama3ToolParser()) == [ContentPart(code)]


def test_values_without_quotes_follow_the_schema() -> None:
    """Regression: a postcode that becomes a number, a number that becomes text."""

    def argument(key: str, value: str) -> object:
        text = (
            f"<tool_call>f\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>"
        )
        part = parse([text], tools=GlmToolParser())[1]
        assert isinstance(part, ToolCallArguments)
        return json.loads(part.text)[key]

    assert argument("a", "8001") == "8001"
    assert argument("a", "null") == "null"
    assert argument("n", "8001") == 8001
    assert argument("n", "many") == "many"
    assert argument("other", "[1]") == [1]
    assert argument("other", "NaN") == "NaN"


def test_ids_of_mistral_are_passed_on() -> None:
    text = "[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}"
    assert parse([text], tools=MistralToolParser())[0] == ToolCallStart(0, "abcDEF123", "f")


@pytest.mark.parametrize(
    ("thinking", "text", "expected"),
    [
        ("maybe", "<think>\nhm\n\n</think>\n\nyes", [ReasoningPart("hm"), ContentPart("yes")]),
        ("maybe", "\n<think>hm</think>yes", [ReasoningPart("hm"), ContentPart("yes")]),
        ("maybe", "<think>\n\n</think>\n\nyes\n", [ContentPart("yes\n")]),
        ("maybe", "yes <think>no</think>", [ContentPart("yes <think>no</think>")]),
        ("maybe", " \n<thin", [ContentPart(" \n<thin")]),
        ("maybe", "<think>cut o", [ReasoningPart("cut o")]),
        ("begun", "\nhm\n</think>\n\nyes", [ReasoningPart("hm"), ContentPart("yes")]),
        ("begun", "<think>\nhm\n</think>yes", [ReasoningPart("hm"), ContentPart("yes")]),
        ("begun", "cut </thi", [ReasoningPart("cut </thi")]),
        ("never", "<think>a</think>", [ContentPart("<think>a</think>")]),
    ],
)
def test_reasoning(thinking: ReasoningMode, text: str, expected: Sequence[Part]) -> None:
    assert parse([text], thinking=thinking) == expected
    assert parse(text, thinking=thinking) == expected


def test_calls_that_are_only_thought_of_are_not_made() -> None:
    text = '<think>a <tool_call>{"name": "g", "arguments": {}}</tool_call></think>done'
    parts = parse([text], tools=HermesToolParser(), thinking="maybe")
    assert [type(part) for part in parts] == [ReasoningPart, ContentPart]


def test_ids_are_random_unless_given() -> None:
    starts = [
        part
        for _ in range(2)
        for part in OutputParser(tools=HermesToolParser()).push(
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
        )
        if isinstance(part, ToolCallStart)
    ]
    assert len({part.id for part in starts}) == 2
    assert all(part.id.startswith("call_") for part in starts)
