"""What is recognised in chat templates, and that nothing else is."""

import pytest

from lowlat.serve.chat.output_parser import ReasoningMarks
from lowlat.serve.chat.template_features import Dialect, find_format
from lowlat.serve.tool_parsers.deepseek import DeepSeekFenced, DeepSeekPlain
from lowlat.serve.tool_parsers.hermes import Hermes
from lowlat.serve.tool_parsers.kimi import Kimi
from lowlat.serve.tool_parsers.llama import Llama
from lowlat.serve.tool_parsers.mistral import MistralList, MistralNames
from lowlat.serve.tool_parsers.xml import Glm, QwenCoder
from tests.fakes import byte_tokenizer
from tests.unit.serve.templates import CHATML, HERMES, TEMPLATES, tokenizer_of, tokenizer_with

FORMATS = {
    "hermes": Hermes, "llama": Llama, "mistral": MistralList, "mistral names": MistralNames,
    "r1": DeepSeekFenced, "v3.1": DeepSeekPlain, "kimi": Kimi, "glm": Glm, "qwen coder": QwenCoder,
    "unknown": type(None), "chatml": type(None),
}  # fmt: skip


@pytest.mark.parametrize("family", TEMPLATES)
def test_formats_of_calls(family: str) -> None:
    dialect = Dialect.of(tokenizer_of(family))
    assert type(dialect.tools) is FORMATS[family]
    assert dialect.supports_tools == (dialect.tools is not None)


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
def test_half_a_format_is_none(source: str) -> None:
    """Holds shut: a guess, which would show users the model's calls as text."""
    assert find_format(source) is None


def test_a_template_that_shows_no_tools_supports_none() -> None:
    """Holds shut: tools the model never hears of, as where only past calls are rendered."""
    source = HERMES.replace("if tools", "if false")
    assert find_format(source) is not None
    assert not Dialect.of(tokenizer_with(source)).supports_tools


@pytest.mark.parametrize(
    ("family", "variables"),
    [("hermes", ["enable_thinking"]), ("v3.1", ["thinking"]), ("chatml", []), ("r1", [])],
)
def test_variables(family: str, variables: list[str]) -> None:
    assert list(Dialect.of(tokenizer_of(family)).variables) == variables


def test_words_are_no_variables() -> None:
    """Holds shut: variables allowed because prose, a string or an attribute has their name."""
    source = CHATML + 'thinking {{ \'thinking\' }}{{ "a \\" thinking" }}{{ messages[0].thinking }}'
    assert list(Dialect.of(tokenizer_with(source)).variables) == []
    used = CHATML + "{% if not thinking %}{% endif %}"
    assert list(Dialect.of(tokenizer_with(used)).variables) == ["thinking"]


def test_system_and_developer_messages() -> None:
    assert Dialect.of(tokenizer_of("hermes")).supports_system
    assert not Dialect.of(tokenizer_of("mistral")).supports_system
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert not Dialect.of(tokenizer_with(silent)).supports_system
    assert not Dialect.of(tokenizer_of("hermes")).has_developer_role
    knows = CHATML + "{{ '' if messages[0].role == 'developer' }}"
    assert Dialect.of(tokenizer_with(knows)).has_developer_role


def test_roles_whose_names_are_shown() -> None:
    for family in TEMPLATES:
        assert not Dialect.of(tokenizer_of(family)).named_roles
    shown = CHATML.replace("{{ m.role }}", "{{ m.role }}{{ '=' + m.name if m.name }}")
    roles = {"system", "developer", "user", "assistant"}
    assert Dialect.of(tokenizer_with(shown)).named_roles == roles
    users = CHATML.replace("{{ m.role }}", "{{ m.name if m.role == 'user' else m.role }}")
    assert Dialect.of(tokenizer_with(users)).named_roles == {"user"}
    assert not Dialect.of(tokenizer_with(None)).named_roles


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
    assert Dialect.of(tokenizer).thinking(ids) == expected


def test_marks_of_other_models() -> None:
    marked = Dialect.of(tokenizer_with(CHATML + "[THINK]a[/THINK]"))
    assert marked.reasoning == ReasoningMarks("[THINK]", "[/THINK]")
    assert Dialect.of(byte_tokenizer()).reasoning is None
    assert Dialect.of(byte_tokenizer()).thinking([65]) == "never"


def test_markers_that_are_special_tokens_are_kept() -> None:
    """Holds shut: calls nobody sees, since decoding drops special tokens."""
    tokenizer = tokenizer_of("kimi")
    dialect = Dialect.of(tokenizer)
    kept = dialect.keep_special(thinking="maybe", tools=True)
    assert {tokenizer.added_tokens[id] for id in kept} == set(Kimi.markers)
    assert dialect.keep_special(thinking="maybe", tools=False) == frozenset()
    assert kept <= tokenizer.special_ids


def test_without_a_template_nothing_is_supported() -> None:
    dialect = Dialect.of(tokenizer_with(None))
    assert not dialect.supports_tools
    assert not dialect.supports_system
    assert dialect.reasoning is None
