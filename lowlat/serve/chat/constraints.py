"""The grammar that holds an answer to its form: calls, text with valid calls, JSON after reasoning.

Owns how these go together. How one format writes a call is in its own file, what a grammar may hold
is the engine's business.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lowlat.generate import structured
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.tool_parsers.base import Function, ToolFormat
from lowlat.serve.tool_parsers.lark import Lark, Rule, between_slashes
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

JSON_OBJECT = '{"type": "object"}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ForcedCalls:
    """What the calls of an answer are held to."""

    format: ToolFormat
    functions: Sequence[Function]
    several: bool
    """Whether more than one call is allowed."""
    required: bool
    """Whether the answer must be a call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReasoningFirst:
    """Reasoning that comes before what a form asks for."""

    open: str
    close: str
    is_begun: bool
    """Whether the answer begins inside it; else it may come or not."""


def forced_output(
    tokenizer: Tokenizer,
    *,
    form: StructuredOutput | None,
    calls: ForcedCalls | None,
    reasoning: ReasoningFirst | None,
) -> StructuredOutput | None:
    """What an answer must look like as a whole; None: anything.

    Raises UserError for a Lark grammar that calls or reasoning would have to be made part of.
    """
    if calls is None and (form is None or reasoning is None):
        return form
    markers = list(calls.format.markers) if calls is not None else []
    markers += [reasoning.open, reasoning.close] if reasoning is not None else []
    lark = Lark(tokenizer, markers)
    body = None if form is None else _form_rule(lark, form)
    if calls is not None:
        body = _calls_rule(lark, calls, body)
    if body is None:
        return form
    if reasoning is not None:
        body = _after_reasoning(lark, body, reasoning)
    return structured.Grammar(lark=lark.text(body))


def _form_rule(lark: Lark, form: StructuredOutput) -> Rule:
    match form:
        case structured.JsonObject():
            return lark.json_text(JSON_OBJECT)
        case structured.JsonSchema():
            return lark.json_text(form.schema)
        case structured.Choice():
            return lark.choice([lark.quoted(option) for option in form.options])
        case structured.Regex():
            return lark.pattern(f"/{between_slashes(form.pattern)}/")
        case structured.Grammar():
            raise UserError(
                "a grammar does not go together with tools, nor with a model that reasons first;"
                " leave the tools out and turn reasoning off, or give a JSON schema"
            )


def _calls_rule(lark: Lark, calls: ForcedCalls, form: Rule | None) -> Rule:
    """Calls; where none is required also text, of the form `form` if there is one."""
    several = calls.several and calls.format.several
    rest = calls.format.rule(lark, calls.functions, several=several)
    opening = calls.format.opening
    whole = lark.sequence(opening, rest)
    if calls.required:
        return whole
    if form is not None:
        return lark.choice([form, whole])
    if opening:
        after_text = lark.sequence(lark.text_until(opening), rest)
        return lark.choice([lark.sequence(lark.text_without(opening)), after_text])
    # Nothing but its first character tells a call from text here.
    text = lark.pattern(r"/(\s*[^{\s](.|\n)*)?/")
    return lark.choice([text, whole])


def _after_reasoning(lark: Lark, body: Rule, reasoning: ReasoningFirst) -> Rule:
    thought = lark.sequence(lark.text_until(reasoning.close), lark.pattern(r"/\n{0,2}/"))
    if reasoning.is_begun:
        return lark.sequence(thought, body)
    return lark.sequence(lark.optional(lark.sequence(reasoning.open, thought)), body)
