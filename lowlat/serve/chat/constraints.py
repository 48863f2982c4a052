"""Constrained output: one grammar for reasoning, tool calls and structured output together.

Combines the grammars; `serve.tool_parsers` hold those of single calls, `generate.structured` the
limits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lowlat.generate import structured
from lowlat.generate.grammar_source import lark_regex
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.chat.output_parser import ReasoningMode, ReasoningTags
from lowlat.serve.tool_parsers.base import ToolFunction, ToolParser
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

JSON_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCallConstraint:
    """The constraint on the tool calls of an output."""

    format: ToolParser
    functions: Sequence[ToolFunction]
    parallel: bool
    """Whether several calls are allowed (parallel_tool_calls)."""
    required: bool
    """Whether the output must be a call (tool_choice)."""


def constrained_output(
    tokenizer: Tokenizer,
    *,
    output: StructuredOutput | None,
    calls: ToolCallConstraint | None,
    marks: ReasoningTags | None = None,
    thinking: ReasoningMode = "never",
) -> StructuredOutput | None:
    """The constraint on a whole output; None: unconstrained.

    `output` constrains the text after the reasoning between `marks`, or the alternative to `calls`.
    Raises UserError for a Lark grammar together with calls or reasoning.
    """
    reasoning = marks if thinking != "never" else None
    if calls is None and (output is None or reasoning is None):
        return output
    markers = list(calls.format.markers) if calls is not None else []
    markers += [reasoning.open, reasoning.close] if reasoning is not None else []
    lark = LarkBuilder(tokenizer, markers)
    body = None if output is None else _output_rule(lark, output)
    if calls is not None:
        body = _calls_rule(lark, calls, body)
    if body is None:
        return output
    if reasoning is not None:
        body = _after_reasoning(lark, body, reasoning, is_begun=thinking == "begun")
    return structured.Grammar(lark=lark.text(body))


def _output_rule(lark: LarkBuilder, output: StructuredOutput) -> Rule:
    match output:
        case structured.JsonObject():
            return lark.json_text(JSON_OBJECT)
        case structured.JsonSchema():
            return lark.json_text(output.schema)
        case structured.Choice():
            return lark.choice([lark.quoted(option) for option in output.options])
        case structured.Regex():
            return lark.pattern(lark_regex(output.pattern))
        case structured.Grammar():
            raise UserError(
                "a grammar cannot be combined with tools or reasoning; leave the tools out and"
                " turn reasoning off, or use a JSON schema"
            )


def _calls_rule(lark: LarkBuilder, calls: ToolCallConstraint, output: Rule | None) -> Rule:
    """Calls; unless they are required also text, which matches `output` if given."""
    parallel = calls.parallel and calls.format.parallel
    rest = calls.format.rule(lark, calls.functions, parallel=parallel)
    opening = calls.format.opening
    whole = lark.sequence(opening, rest)
    if calls.required:
        return whole
    if output is not None:
        return lark.choice([output, whole])
    if opening:
        after_text = lark.sequence(lark.text_until(opening), rest)
        return lark.choice([lark.sequence(lark.text_without(opening)), after_text])
    # Only its first character distinguishes a call from text here.
    text = lark.pattern(r"/(\s*[^{\s](.|\n)*)?/")
    return lark.choice([text, whole])


def _after_reasoning(
    lark: LarkBuilder, body: Rule, reasoning: ReasoningTags, *, is_begun: bool
) -> Rule:
    """`body` after the reasoning, which is optional unless the output begins inside it."""
    thought = lark.sequence(lark.text_until(reasoning.close), lark.pattern(r"/\n{0,2}/"))
    if is_begun:
        return lark.sequence(thought, body)
    return lark.sequence(lark.optional(lark.sequence(reasoning.open, thought)), body)
