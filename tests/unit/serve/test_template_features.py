"""Detection of chat template features; unknown formats are not supported."""

import pytest

from lowlat.serve.chat.output_parser import ReasoningTags
from lowlat.serve.chat.template_features import TemplateFeatures, find_tool_parser
from lowlat.serve.tool_parsers.formats import (
    DeepSeekV3ToolParser,
    DeepSeekV31ToolParser,
    GigaChat3ToolParser,
    GigaChat31ToolParser,
    HermesToolParser,
    KimiK2ToolParser,
    Llama3ToolParser,
    MistralListToolParser,
    MistralToolParser,
)
from lowlat.serve.tool_parsers.python_calls import MiniCPM3ToolParser
from lowlat.serve.tool_parsers.xml import GlmToolParser, Qwen3CoderToolParser
from tests.fakes import byte_tokenizer
from tests.unit.serve.templates import CHATML, HERMES, TEMPLATES, tokenizer_of, tokenizer_with

FORMATS = {
    "hermes": HermesToolParser,
    "llama": Llama3ToolParser,
    "mistral": MistralListToolParser,
    "mistral names": MistralToolParser,
    "r1": DeepSeekV3ToolParser,
    "v3.1": DeepSeekV31ToolParser,
    "kimi": KimiK2ToolParser,
    "glm": GlmToolParser,
    "qwen coder": Qwen3CoderToolParser,
    "gigachat 3": GigaChat3ToolParser,
    "gigachat 3.1": GigaChat31ToolParser,
    "minicpm3": MiniCPM3ToolParser,
    "unknown": type(None),
    "chatml": type(None),
}


@pytest.mark.parametrize("family", TEMPLATES)
def test_tool_call_formats(family: str) -> None:
    features = TemplateFeatures.of(tokenizer_of(family))
    assert type(features.tools) is FORMATS[family]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "<tool_call> without a form",
        "<tool_call>\n<function=x></function>",
        'ipython {"name": x, "parameters": y}',
        "<|start_header_id|> ipython",
        "TOOL_CALLS tool_calls",
    ],
)
def test_half_a_format_is_unknown(source: str) -> None:
    """Regression: a guess, which would show users the model's calls as text."""
    assert find_tool_parser(source) is None


def test_a_template_that_shows_no_tools_supports_none() -> None:
    """Regression: tools the model never hears of, as where only past calls are rendered."""
    source = HERMES.replace("if tools", "if false")
    assert find_tool_parser(source) is not None
    assert TemplateFeatures.of(tokenizer_with(source)).tools is None


@pytest.mark.parametrize(
    ("family", "variables"),
    [("hermes", ["enable_thinking"]), ("v3.1", ["thinking"]), ("chatml", []), ("r1", [])],
)
def test_variables(family: str, variables: list[str]) -> None:
    assert list(TemplateFeatures.of(tokenizer_of(family)).variables) == variables


def test_words_are_no_variables() -> None:
    """Regression: variables allowed because prose, a string or an attribute has their name."""
    source = CHATML + 'thinking {{ \'thinking\' }}{{ "a \\" thinking" }}{{ messages[0].thinking }}'
    assert list(TemplateFeatures.of(tokenizer_with(source)).variables) == []
    used = CHATML + "{% if not thinking %}{% endif %}"
    assert list(TemplateFeatures.of(tokenizer_with(used)).variables) == ["thinking"]


def test_system_and_developer_messages() -> None:
    assert TemplateFeatures.of(tokenizer_of("hermes")).supports_system
    assert not TemplateFeatures.of(tokenizer_of("mistral")).supports_system
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert not TemplateFeatures.of(tokenizer_with(silent)).supports_system
    assert not TemplateFeatures.of(tokenizer_of("hermes")).has_developer_role
    knows = CHATML + "{{ '' if messages[0].role == 'developer' }}"
    assert TemplateFeatures.of(tokenizer_with(knows)).has_developer_role


def test_roles_with_rendered_names() -> None:
    for family in TEMPLATES:
        assert not TemplateFeatures.of(tokenizer_of(family)).named_roles
    shown = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ '=' + m.name if m.name }}")
    roles = {"system", "developer", "user", "assistant"}
    assert TemplateFeatures.of(tokenizer_with(shown)).named_roles == roles
    users = CHATML.replace("{{ m.role }}", "{{ m.name if m.role == 'user' else m.role }}")
    assert TemplateFeatures.of(tokenizer_with(users)).named_roles == {"user"}
    assert not TemplateFeatures.of(tokenizer_with(None)).named_roles


@pytest.mark.parametrize(
    ("family", "variables", "expected"),
    [
        ("hermes", {}, "maybe"),
        ("hermes", {"enable_thinking": False}, "never"),
        ("r1", {}, "begun"),
        ("v3.1", {}, "never"),
        ("v3.1", {"thinking": True}, "begun"),
    ],
)
def test_where_reasoning_begins(family: str, variables: dict[str, bool], expected: str) -> None:
    tokenizer = tokenizer_of(family)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], **variables)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert TemplateFeatures.of(tokenizer).thinking(ids) == expected


def test_marks_of_other_models() -> None:
    marked = TemplateFeatures.of(tokenizer_with(CHATML + "[THINK]a[/THINK]"))
    assert marked.reasoning == ReasoningTags("[THINK]", "[/THINK]")
    assert TemplateFeatures.of(byte_tokenizer()).reasoning is None
    assert TemplateFeatures.of(byte_tokenizer()).thinking([65]) == "never"


def test_special_token_markers_are_kept_in_the_text() -> None:
    """Regression: calls that are lost because decoding drops special tokens."""
    tokenizer = tokenizer_of("kimi")
    features = TemplateFeatures.of(tokenizer)
    kept = features.keep_special(thinking="maybe", tools=True)
    assert {tokenizer.added_tokens[id] for id in kept} == set(KimiK2ToolParser.markers)
    assert features.keep_special(thinking="maybe", tools=False) == frozenset()
    assert kept <= tokenizer.special_ids


def test_without_a_template_nothing_is_supported() -> None:
    features = TemplateFeatures.of(tokenizer_with(None))
    assert features.tools is None
    assert not features.supports_system
    assert features.reasoning is None
