"""Dialect: what a model's own chat template says about tools, reasoning and its variables.

Owns the recognition, from the template's source and from what it renders; nothing is guessed, what
is not recognised is not supported. The formats themselves are in tools/.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lowlat.serve.chat.output_parser import AnswerParser, ReasoningMarks, Thinking
from lowlat.serve.tool_parsers.base import ToolFormat
from lowlat.serve.tool_parsers.deepseek import DeepSeekFenced, DeepSeekPlain
from lowlat.serve.tool_parsers.hermes import Hermes
from lowlat.serve.tool_parsers.kimi import Kimi
from lowlat.serve.tool_parsers.llama import Llama
from lowlat.serve.tool_parsers.mistral import MistralList, MistralNames
from lowlat.serve.tool_parsers.state import Schemas
from lowlat.serve.tool_parsers.xml import Glm, QwenCoder
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

MARKS = (
    ReasoningMarks("<think>", "</think>"),
    ReasoningMarks("[THINK]", "[/THINK]"),
    ReasoningMarks("<seed:think>", "</seed:think>"),
    ReasoningMarks("◁think▷", "◁/think▷"),
)
VARIABLES: Mapping[str, tuple[Any, ...]] = {
    "enable_thinking": (True, False),
    "thinking": (True, False),
    "clear_thinking": (True, False),
    "reasoning_effort": ("low", "medium", "high"),
}
"""Variables of templates that a request may set, and to what."""
ROLES = ("system", "developer", "user", "assistant")
PROBE = "probe_7f3a"
TAIL = 32
"""Tokens at the end of a prompt in which its last mark is looked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dialect:
    """How one model wants to be spoken to, and speaks."""

    tokenizer: Tokenizer
    tools: ToolFormat | None
    """How it writes tool calls; None: tools cannot be used with it."""
    reasoning: ReasoningMarks | None
    """What stands around its reasoning, if it reasons."""
    variables: Mapping[str, tuple[Any, ...]]
    """Those of VARIABLES that the template knows."""
    supports_system: bool
    """Whether the template shows system messages to the model."""
    named_roles: frozenset[str]
    """Roles whose messages' `name` the template shows to the model."""
    has_developer_role: bool
    """Whether the template tells developer messages from system messages."""
    takes_text_arguments: bool
    """Whether past calls' arguments may be JSON text, which keeps them as the model wrote them."""

    @staticmethod
    @lru_cache(maxsize=8)
    def of(tokenizer: Tokenizer) -> "Dialect":
        """The dialect of `tokenizer`'s chat template; nothing is supported without one."""
        source = tokenizer.chat_template or ""
        code = _code(source)
        system = [{"role": "system", "content": PROBE}, {"role": "user", "content": "x"}]
        tool_source = tokenizer.template_for(()) or ""
        format = find_format(tool_source)
        return Dialect(
            tokenizer=tokenizer,
            tools=format if format is not None and _shows_tools(tokenizer) else None,
            reasoning=_find_marks(source, tokenizer),
            variables={name: VARIABLES[name] for name in VARIABLES if _uses(code, name)},
            supports_system=_shows(tokenizer, system),
            named_roles=frozenset(role for role in ROLES if _shows_name(tokenizer, role)),
            has_developer_role=re.search(r"""['"]developer['"]""", source) is not None,
            takes_text_arguments=_takes_text_arguments(tool_source, format),
        )

    @property
    def supports_tools(self) -> bool:
        return self.tools is not None

    def thinking(self, ids: Sequence[int]) -> Thinking:
        """Whether the answer to the prompt `ids` can begin with reasoning, or is inside it."""
        if self.reasoning is None:
            return "never"
        tail = self.tokenizer.decode(ids[-TAIL:], skip_special_tokens=False).rstrip()
        if tail.endswith(self.reasoning.open):
            return "begun"
        return "never" if tail.endswith(self.reasoning.close) else "maybe"

    def keep_special(self, *, thinking: Thinking, tools: bool) -> frozenset[int]:
        """Ids of control tokens whose text the parser needs to see."""
        texts: set[str] = set()
        if self.reasoning is not None and thinking != "never":
            texts |= {self.reasoning.open, self.reasoning.close}
        if self.tools is not None and tools:
            texts |= set(self.tools.markers)
        tokenizer = self.tokenizer
        return frozenset(id for id in tokenizer.special_ids if tokenizer.added_tokens[id] in texts)

    def parser(self, *, thinking: Thinking, schemas: Schemas | None) -> AnswerParser:
        """A parser for one answer; `schemas` None: no call is looked for."""
        return AnswerParser(
            marks=self.reasoning,
            thinking=thinking,
            tools=None if schemas is None else self.tools,
            schemas=schemas,
        )


def find_format(source: str) -> ToolFormat | None:
    """The way of writing calls that the template with this source teaches, if it is known."""
    if "<|tool_calls_section_begin|>" in source:
        return Kimi()
    if "<｜tool▁calls▁begin｜>" in source:  # noqa: RUF001
        return DeepSeekFenced() if "```json" in source else DeepSeekPlain()
    if "[TOOL_CALLS]" in source:
        return MistralNames() if "[ARGS]" in source else MistralList()
    if "<tool_call>" in source:
        return _tagged_format(source)
    is_llama = "<|start_header_id|>" in source and "ipython" in source
    return Llama() if is_llama and re.search(r'\\?"parameters\\?": ', source) else None


def _tagged_format(source: str) -> ToolFormat | None:
    """Several unlike formats use the one tag."""
    if "<arg_key>" in source:
        return Glm()
    if "<function=" in source:
        return QwenCoder() if "<parameter=" in source else None
    is_json = re.search(r'\{\\?"name\\?": .*?\\?"arguments\\?": ', source, re.DOTALL)
    return Hermes() if is_json else None


def _find_marks(source: str, tokenizer: Tokenizer) -> ReasoningMarks | None:
    """Marks that the template names, else marks that are tokens of the model."""
    named = [marks for marks in MARKS if marks.close in source]
    known = set(tokenizer.added_tokens.values()) if source else set()
    return next(iter(named + [marks for marks in MARKS if marks.close in known]), None)


def _takes_text_arguments(source: str, format: ToolFormat | None) -> bool:
    asks = re.search(r"""\barguments['"]?\]? is string\b""", source)
    return asks is not None or (format is not None and format.text_arguments)


def _code(source: str) -> str:
    """The expressions and statements of a template, without their string literals."""
    blocks = re.findall(r"\{[{%](.*?)[}%]\}", source, re.DOTALL)
    return "\n".join(re.sub(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", "''", b) for b in blocks)


def _uses(code: str, name: str) -> bool:
    """Whether `code` reads the variable `name` (not an attribute of that name)."""
    return re.search(rf"(?<![\w.]){name}\b", code) is not None


def _shows(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **more: Any) -> bool:
    """Whether PROBE, somewhere in `messages` or `more`, reaches the prompt."""
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
