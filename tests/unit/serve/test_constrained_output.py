"""Constrained output: texts that the grammar accepts parse as valid calls, in every format."""

import json
import random
import re
from typing import Any

import pytest

from lowlat.generate.grammar import CompiledGrammar, GrammarCompiler
from lowlat.generate.structured import (
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    Regex,
    StructuredOutput,
)
from lowlat.serve.chat.constraints import ToolCallConstraint, constrained_output
from lowlat.serve.chat.output_parser import OutputParser, ReasoningMode, ReasoningTags
from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.formats import (
    DeepSeekV3ToolParser,
    GigaChat31ToolParser,
    HermesToolParser,
    Llama3ToolParser,
    MistralListToolParser,
    MistralToolParser,
)
from lowlat.serve.tool_parsers.python_calls import MiniCPM3ToolParser
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    Part,
    ToolCallArguments,
    ToolCallStart,
)
from lowlat.serve.tool_parsers.xml import GlmToolParser, Qwen3CoderToolParser
from lowlat.utils.errors import UserError
from tests.unit.serve.parsing import joined_parts
from tests.unit.serve.templates import DEEPSEEK, FORMATS, IDS, KIMI, tokenizer_of

TOKENIZER = tokenizer_of("chatml")
MARKS = ReasoningTags("<think>", "</think>")
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": WEATHER, "stop": {"type": "object", "properties": {}}}
FUNCTIONS = [ToolFunction(name=name, schema=schema) for name, schema in SCHEMAS.items()]
SCHEMAS["stop"]["additionalProperties"] = False
ARGUMENTS = '{"city": "Bern", "days": 3}'
BEGIN, END, CALL, CALL_END, SEP = DEEPSEEK
SECTION, SECTION_END, KIMI_CALL, KIMI_END, KIMI_ARGUMENTS = KIMI
WRITTEN = {
    "HermesToolParser": (
        f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
    ),
    "Llama3ToolParser": f'{{"name": "weather", "parameters": {ARGUMENTS}}}',
    "MistralListToolParser": f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}]',
    "MistralToolParser": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}",
    "DeepSeekV3ToolParser": (
        f"{BEGIN}{CALL}function{SEP}weather\n```json\n{ARGUMENTS}\n```{CALL_END}{END}"
    ),
    "DeepSeekV31ToolParser": f"{BEGIN}{CALL}weather{SEP}{ARGUMENTS}{CALL_END}{END}",
    "KimiK2ToolParser": (
        f"{SECTION}{KIMI_CALL}functions.weather:0{KIMI_ARGUMENTS}{ARGUMENTS}{KIMI_END}{SECTION_END}"
    ),
    "GigaChat3ToolParser": (
        f'function call<|role_sep|>\n{{"name": "weather", "arguments": {ARGUMENTS}}}'
    ),
    "GigaChat31ToolParser": f'<|function_call|>{{"name": "weather", "arguments": {ARGUMENTS}}}',
    "MiniCPM3ToolParser": (
        '<|tool_call_start|>\n```python\nweather(city="Bern", days=3)\n```\n<|tool_call_end|>'
    ),
    "GlmToolParser": (
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Bern</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
    ),
    "Qwen3CoderToolParser": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nBern\n</parameter>\n<parameter=days>\n3"
        "\n</parameter>\n</function>\n</tool_call>"
    ),
}


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER, TOKENIZER.vocab_size)


def forced(
    tools: ToolParser, *, parallel: bool = True, required: bool = True, output: Any = None,
    thinking: ReasoningMode = "never",
) -> StructuredOutput:  # fmt: skip
    calls = ToolCallConstraint(
        format=tools, functions=FUNCTIONS, parallel=parallel, required=required
    )
    output = constrained_output(
        TOKENIZER, output=output, calls=calls, marks=MARKS, thinking=thinking
    )
    assert output is not None
    return output


def accepts(grammar: CompiledGrammar, text: str) -> bool:
    """Whether `text`, and the end after it, are let through."""
    state = grammar.start()
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        if not state.mask()[token]:
            return False
        state.accept(token)
    return any(bool(state.mask()[token]) for token in TOKENIZER.eos_ids)


def walk(grammar: CompiledGrammar, seed: int) -> str:
    """A random text that the grammar lets through, short ones preferred."""
    rng = random.Random(seed)
    state, ids = grammar.start(), []
    for _ in range(3000):
        if rng.random() < 0.1:
            for token in b"</parameter>":
                if not state.mask()[token]:
                    break
                ids.append(token)
                state.accept(token)
        allowed = state.mask().nonzero().flatten().tolist()
        if any(token in TOKENIZER.eos_ids for token in allowed):
            return TOKENIZER.decode(ids, skip_special_tokens=False)
        control = [token for token in allowed if token in TOKENIZER.added_tokens]
        closing = [token for token in allowed if chr(token) in '"}]' if token < 256]
        choices = rng.choice([group for group in (allowed, control, closing) if group])
        ids.append(rng.choice(choices))
        state.accept(ids[-1])
    raise AssertionError(TOKENIZER.decode(ids, skip_special_tokens=False))


def parse(text: str, tools: ToolParser | None, thinking: ReasoningMode = "never") -> list[Part]:
    parser = OutputParser(marks=MARKS, thinking=thinking, tools=tools, schemas=SCHEMAS)
    return joined_parts(parser, [text])


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_what_is_cut_off_within_a_call_shows_none_of_its_marks(tools: ToolParser) -> None:
    text = WRITTEN[type(tools).__name__]
    whole = parse(text, tools)
    cut = [parse(text[:size], tools) for size in range(len(text))]
    begun = [parts for parts in cut if any(isinstance(part, ToolCallStart) for part in parts)]
    assert len(begun) > 9
    for parts in begun:
        assert not any(isinstance(part, ContentPart) for part in parts)
    assert all(parts[1:] == whole[1:] for parts in begun if whole[-1] in parts)


def check_calls(parts: list[Part]) -> int:
    """Assert that `parts` are calls with arguments that match their schemas; returns how many."""
    starts = [part for part in parts if isinstance(part, ToolCallStart)]
    arguments = [part for part in parts if isinstance(part, ToolCallArguments)]
    assert len(starts) == len(arguments)
    for start, argument in zip(starts, arguments, strict=True):
        value = json.loads(argument.text)
        if start.name == "stop":
            assert value == {}
        else:
            assert start.name == "weather"
            assert {"city", "days"} <= set(value) <= {"city", "days", "unit"}
            assert isinstance(value["city"], str)
            assert type(value["days"]) is int
            assert value.get("unit", "C") in ("C", "F")
    return len(starts)


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_what_models_write_is_let_through(tools: ToolParser, compiler: GrammarCompiler) -> None:
    """Regression: a grammar that forces another spelling than the model was trained on."""
    grammar = compiler.compile(forced(tools))
    text = WRITTEN[type(tools).__name__]
    assert accepts(grammar, text)
    assert not accepts(grammar, text.replace("3", "x"))
    assert not accepts(grammar, text.replace("weather", "wither"))
    assert not accepts(grammar, "Well.")
    assert check_calls(parse(text, tools)) == 1


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_what_is_let_through_is_read_as_valid_calls(
    tools: ToolParser, compiler: GrammarCompiler
) -> None:
    grammar = compiler.compile(forced(tools, parallel=False))
    for seed in range(8):
        parts = parse(walk(grammar, seed), tools)
        assert check_calls(parts) == 1
        assert not any(isinstance(part, ContentPart) for part in parts)


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_several_calls(tools: ToolParser, compiler: GrammarCompiler) -> None:
    """Regression: parallel_tool_calls=false that lets a second call through, and the reverse."""
    text = WRITTEN[type(tools).__name__]
    match tools:
        case HermesToolParser() | GlmToolParser() | Qwen3CoderToolParser() | GigaChat31ToolParser():
            twice = f"{text}\n{text}"
        case MistralToolParser():
            twice = text + text
        case MistralListToolParser():
            twice = text.replace("}]", "}, ") + text.removeprefix("[TOOL_CALLS] [")
        case MiniCPM3ToolParser():
            (line,) = re.findall(r"weather\(.*\)", text)
            twice = text.replace(line, f"{line}\n{line}")
        case Llama3ToolParser():
            twice = f"{text}; {text}"
        case _:
            opening, closing = tools.markers[:2]
            inner = text.removeprefix(opening).removesuffix(closing)
            separator = "\n" if isinstance(tools, DeepSeekV3ToolParser) else ""
            twice = f"{opening}{inner}{separator}{inner}{closing}"
    assert check_calls(parse(twice, tools)) == 2
    assert accepts(compiler.compile(forced(tools)), twice) == tools.parallel
    assert not accepts(compiler.compile(forced(tools, parallel=False)), twice)


@pytest.mark.parametrize("tools", FORMATS, ids=IDS)
def test_text_or_valid_calls(tools: ToolParser, compiler: GrammarCompiler) -> None:
    """Regression: strict functions whose arguments are checked only when a call is required."""
    grammar = compiler.compile(forced(tools, required=False, parallel=False))
    text = WRITTEN[type(tools).__name__]
    assert accepts(grammar, "Some text.\n<b>, [x] and 3 < 4.")
    assert accepts(grammar, text)
    assert accepts(grammar, f"Well.\n{text}")
    assert not accepts(grammar, text.replace("3", "x"))
    assert not accepts(grammar, text + text)
    if tools.opening:
        assert not accepts(grammar, f"Well.\n{text}".replace("3", "x"))


def test_structured_output_or_calls(compiler: GrammarCompiler) -> None:
    output = JsonSchema(schema='{"type": "object", "properties": {"a": {"type": "null"}}}')
    grammar = compiler.compile(forced(HermesToolParser(), required=False, output=output))
    assert accepts(grammar, '{"a": null}')
    assert accepts(grammar, WRITTEN["HermesToolParser"])
    assert not accepts(grammar, "text")


@pytest.mark.parametrize(
    ("output", "good", "bad"),
    [
        (JsonObject(), '{"a": 1}', "[1]"),
        (JsonSchema(schema='{"type": "integer"}'), "12", '"12"'),
        (Choice(options=("yes/no", 'a "b"\n', "<think>")), 'a "b"\n', "yes"),
        (Regex(pattern=r"a/b\/[c\n]+"), "a/b/c\nc", "a/b/"),
    ],
)
@pytest.mark.parametrize("thinking", ["begun", "maybe"])
def test_structured_output_after_reasoning(
    output: StructuredOutput,
    good: str,
    bad: str,
    thinking: ReasoningMode,
    compiler: GrammarCompiler,
) -> None:
    """Regression: a schema that the reasoning has to match, or that holds for nothing after it."""
    output = constrained_output(
        TOKENIZER, output=output, calls=None, marks=MARKS, thinking=thinking
    )
    assert output is not None
    grammar = compiler.compile(output)
    thought = "Let <b> me.\n</think>\n\n" if thinking == "begun" else "<think>\nLet.\n</think>\n\n"
    assert accepts(grammar, thought + good)
    assert not accepts(grammar, thought + bad)
    assert not accepts(grammar, thought)
    assert accepts(grammar, good) == (thinking == "maybe")


def test_calls_after_reasoning(compiler: GrammarCompiler) -> None:
    grammar = compiler.compile(forced(HermesToolParser(), thinking="maybe"))
    text = f"<think>\nI <tool_call> it.\n</think>\n\n{WRITTEN['HermesToolParser']}"
    assert accepts(grammar, text)
    assert check_calls(parse(text, HermesToolParser(), "maybe")) == 1
    assert accepts(grammar, WRITTEN["HermesToolParser"])


def test_nothing_is_forced_without_need() -> None:
    output = JsonObject()
    assert constrained_output(TOKENIZER, output=output, calls=None) is output
    assert (
        constrained_output(TOKENIZER, output=None, calls=None, marks=MARKS, thinking="begun")
        is None
    )


def test_a_grammar_is_no_part_of_another() -> None:
    with pytest.raises(UserError, match="grammar cannot be combined"):
        constrained_output(
            TOKENIZER, output=Grammar(lark="start: /a/"), calls=None, marks=MARKS, thinking="begun"
        )


def test_texts_of_a_schema_are_no_control_tokens(compiler: GrammarCompiler) -> None:
    """Regression: a property named like a control token, which the grammar would make the model
    write.
    """
    schema = {"type": "object", "properties": {"</s>": {"enum": ["<arg_key>"], "type": "string"}}}
    calls = ToolCallConstraint(
        format=GlmToolParser(),
        functions=[ToolFunction(name="f", schema=schema)],
        parallel=True,
        required=True,
    )
    output = constrained_output(TOKENIZER, output=None, calls=calls)
    assert isinstance(output, Grammar)
    eos = next(iter(TOKENIZER.eos_ids))
    assert f"<[{eos}]>" not in output.lark
    for seed in range(5):
        assert "f" in walk(compiler.compile(output), seed)
