"""Chat template features: detect a model's tool-call format, reasoning tags and template variables.

Detection uses the template's source and what it renders. Nothing is guessed: an unknown format is
not supported. The formats are in `serve.tool_parsers`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from lowlat.serve.chat.output_parser import ReasoningMode
from lowlat.serve.tool_parsers.base import ToolParser
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
from lowlat.text.reasoning_tags import ReasoningTags, find_reasoning_tags
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

VARIABLES: Mapping[str, tuple[Any, ...]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "clear_thinking": (True, False),
    "reasoning_effort": ("low", "medium", "high"),
}
"""Template variables that a request may set, with the allowed values."""
SWITCHES = ("enable_thinking", "thinking")
"""Template variables that turn reasoning on and off."""
LEVELS = {"none": "low", "minimal": "low", "xhigh": "high", "max": "high"}
"""Efforts of OpenAI's API -> the nearest that templates know."""
ROLES = ("system", "developer", "user", "assistant")
PROBE = "probe_7f3a"
TAIL = 32
"""Tokens at the end of a prompt that are searched for a reasoning tag."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TemplateFeatures:
    """Features of one model's chat template."""

    tokenizer: Tokenizer
    tools: ToolParser | None
    """The tool-call format; None: tools are not supported."""
    reasoning: ReasoningTags | None
    """The tags around reasoning; None: the model does not reason."""
    variables: Mapping[str, tuple[Any, ...]]
    """Those of VARIABLES that the template reads."""
    supports_system: bool
    """Whether the template renders system messages."""
    supports_later_system: bool
    """Whether it renders system messages after the first message, too."""
    named_roles: frozenset[str]
    """Roles for which the template renders a message's `name`."""
    has_developer_role: bool
    """Whether the template distinguishes developer from system messages."""
    takes_json_arguments: bool
    """Whether arguments of past calls may be JSON text, which preserves the model's spelling."""

    @staticmethod
    def of(tokenizer: Tokenizer) -> "TemplateFeatures":
        """The features of `tokenizer`'s chat template; without a template, none. The first call
        renders the template, which takes some tenths of a second."""
        found = _FOUND.get(tokenizer)
        if found is None:
            found = _FOUND[tokenizer] = _detect(tokenizer)
        return found(tokenizer=tokenizer)

    def thinking(self, ids: Sequence[int]) -> ReasoningMode:
        """Whether the output after the prompt `ids` may begin with reasoning, or inside it."""
        if self.reasoning is None:
            return "never"
        tail = self.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False).rstrip()
        if tail.endswith(self.reasoning.open):
            return "begun"
        return "never" if tail.endswith(self.reasoning.close) else "maybe"

    def effort_variables(self, effort: str | None) -> dict[str, bool | str]:
        """Template variables for a reasoning_effort; none and minimal turn reasoning off."""
        if effort is None:
            return {}
        values: dict[str, bool | str] = dict.fromkeys(SWITCHES, effort not in ("none", "minimal"))
        values["reasoning_effort"] = LEVELS.get(effort, effort)
        return {name: value for name, value in values.items() if name in self.variables}

    def keep_special(self, *, thinking: ReasoningMode, tools: bool) -> frozenset[int]:
        """Ids of special tokens whose text the parser needs."""
        texts: set[str] = set()
        if self.reasoning is not None and thinking != "never":
            texts |= {self.reasoning.open, self.reasoning.close}
        if self.tools is not None and tools:
            texts |= set(self.tools.markers)
        tokenizer = self.tokenizer
        return frozenset(id for id in tokenizer.special_ids if tokenizer.added_tokens[id] in texts)


_FOUND: WeakKeyDictionary[Tokenizer, partial[TemplateFeatures]] = WeakKeyDictionary()
"""Features without the tokenizer, whose life they do not prolong."""


def _detect(tokenizer: Tokenizer) -> partial[TemplateFeatures]:
    source = tokenizer.chat_template or ""
    code = _code(source)
    system = [{"role": "system", "content": PROBE}, {"role": "user", "content": "x"}]
    tool_source = tokenizer.template_for(()) or ""
    format = find_tool_parser(tool_source)
    return partial(
        TemplateFeatures,
        tools=format if format is not None and _shows_tools(tokenizer) else None,
        reasoning=find_reasoning_tags(tokenizer),
        variables={name: VARIABLES[name] for name in VARIABLES if _uses(code, name)},
        supports_system=_shows(tokenizer, system),
        supports_later_system=_shows(tokenizer, system[::-1]),
        named_roles=frozenset(role for role in ROLES if _shows_name(tokenizer, role)),
        has_developer_role=re.search(r"""['"]developer['"]""", source) is not None,
        takes_json_arguments=_takes_text_arguments(tool_source, format),
    )


def find_tool_parser(source: str) -> ToolParser | None:
    """The parser for the tool-call format in a template's source; None: unknown."""
    if "<|tool_calls_section_begin|>" in source:
        return KimiK2ToolParser()
    if "<｜tool▁calls▁begin｜>" in source:  # noqa: RUF001
        return DeepSeekV3ToolParser() if "```json" in source else DeepSeekV31ToolParser()
    if "<|function_call|>" in source:
        return GigaChat31ToolParser()
    if "function call<|role_sep|>" in source:
        return GigaChat3ToolParser()
    if "[TOOL_CALLS]" in source:
        return MistralToolParser() if "[ARGS]" in source else MistralListToolParser()
    if "<|tool_call_start|>" in source and "```python" in source:
        return MiniCPM3ToolParser()
    if "<tool_call>" in source:
        return _tagged_format(source)
    is_llama = "<|start_header_id|>" in source and "ipython" in source
    return Llama3ToolParser() if is_llama and re.search(r'\\?"parameters\\?": ', source) else None


def _tagged_format(source: str) -> ToolParser | None:
    """Several formats share the tag <tool_call>."""
    if "<arg_key>" in source:
        return GlmToolParser()
    if "<function=" in source:
        return Qwen3CoderToolParser() if "<parameter=" in source else None
    is_json = re.search(r'\{\\?"name\\?": .*?\\?"arguments\\?": ', source, re.DOTALL)
    return HermesToolParser() if is_json else None


def _takes_text_arguments(source: str, format: ToolParser | None) -> bool:
    asks = re.search(r"""\barguments['"]?\]? is string\b""", source)
    return asks is not None or (format is not None and format.json_arguments)


def _code(source: str) -> str:
    """Expressions and statements of a template, without string literals."""
    blocks = re.findall(r"\{[{%](.*?)[}%]\}", source, re.DOTALL)
    return "\n".join(re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", "''", b) for b in blocks)


def _uses(code: str, name: str) -> bool:
    """Whether `code` reads the variable `name` (not an attribute of that name)."""
    return re.search(rf"(?<![\w.]){name}\b", code) is not None


def _shows(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **more: Any) -> bool:
    """Whether the template renders PROBE, which is in `messages` or `more`."""
    try:
        return PROBE in tokenizer.apply_chat_template(messages, **more)
    except UserError:
        return False


def _shows_name(tokenizer: Tokenizer, role: str) -> bool:
    named = {"role": role, "content": "x", "name": PROBE}
    user = {"role": "user", "content": "x"}
    around = {"user": [named], "assistant": [user, named, user]}
    return _shows(tokenizer, around.get(role, [named, user]))


def _shows_tools(tokenizer: Tokenizer) -> bool:
    parameters = {"type": "object", "properties": {}}
    function = {"name": PROBE, "description": "x", "parameters": parameters}
    tools = [{"type": "function", "function": function}]
    return _shows(tokenizer, [{"role": "user", "content": "x"}], tools=tools)
