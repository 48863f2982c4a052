"""From a chat request to what the engine needs: prompt, sampling options, form and parser.

Owns what the model's template is shown and which fields a model cannot serve. The template's own
refusals (roles that must alternate, say) are passed on.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lowlat.engine.params import SamplingParams
from lowlat.generate.model import Model
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.chat.constraints import ForcedCalls, ReasoningFirst, forced_output
from lowlat.serve.chat.messages import template_messages
from lowlat.serve.chat.output_parser import AnswerParser, Thinking
from lowlat.serve.chat.template_features import Dialect
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.tools import Function, NamedTool, Tool
from lowlat.serve.structured_outputs import format_output, structured_output
from lowlat.serve.tool_parsers.base import Function as CallableFunction
from lowlat.text.chat_prompt import encode_chat
from lowlat.utils.errors import UserError

NO_ARGUMENTS: dict[str, object] = {"type": "object", "properties": {}}
"""What templates are shown of a function without parameters, as models were trained on it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedChat:
    """A chat request in the engine's terms."""

    ids: tuple[int, ...]
    """The prompt."""
    params: SamplingParams
    structured: StructuredOutput | None
    """What the answer's text must look like."""
    keep_special: frozenset[int]
    """Control tokens whose text the parser needs to see."""
    make_parser: Callable[[], AnswerParser]
    """A parser for each completion."""


def prepare_chat(model: Model, request: ChatRequest) -> PreparedChat:
    """Check `request` against `model` and make its prompt.

    Raises RequestError naming the field for what this model cannot do, UserError for sampling
    options that contradict each other.
    """
    dialect = Dialect.of(model.tokenizer)
    tools = _shown_tools(dialect, request)
    ids = _encode(model, dialect, request, tools)
    thinking = dialect.thinking(ids)
    structured = _form(dialect, request, tools, thinking)
    if structured is not None:
        request.check_end()
    schemas = {tool.function.name: _schema(tool.function) for tool in tools} if tools else None
    return PreparedChat(
        ids=tuple(ids),
        params=request.to_params(),
        structured=structured,
        keep_special=dialect.keep_special(thinking=thinking, tools=bool(tools)),
        make_parser=lambda: dialect.parser(thinking=thinking, schemas=schemas),
    )


def _shown_tools(dialect: Dialect, request: ChatRequest) -> list[Tool]:
    """The functions the model is told of."""
    if not request.tools or request.tool_choice == "none":
        return []
    if not dialect.supports_tools:
        raise RequestError(
            "tools: this model's chat template has no known way to call functions; leave them out",
            param="tools",
        )
    return request.tools


def _encode(model: Model, dialect: Dialect, request: ChatRequest, tools: list[Tool]) -> list[int]:
    messages = template_messages(dialect, request.messages)
    check_size(model, (str(message.get("content") or "") for message in messages), "messages")
    described = [_described(tool.function) for tool in tools] or None
    variables = _variables(dialect, request)
    try:
        ids = encode_chat(model.tokenizer, messages, tools=described, **variables)
    except UserError as error:
        raise RequestError(f"messages: {error}", param="messages") from error
    if not 1 <= len(ids) < model.context:
        raise RequestError(
            f"messages: the prompt has {len(ids)} tokens and needs from 1 to {model.context - 1},"
            f" as the context holds {model.context}; shorten the conversation",
            param="messages",
            code="context_length_exceeded",
        )
    return ids


def _described(function: Function) -> dict[str, Any]:
    """A function as templates expect it."""
    shown: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        shown["description"] = function.description
    return {"type": "function", "function": {**shown, "parameters": _schema(function)}}


def _schema(function: Function) -> dict[str, object]:
    return NO_ARGUMENTS if function.parameters is None else function.parameters


def _held_schema(function: Function, *, is_strict: bool) -> dict[str, object]:
    """What the arguments of a call are held to."""
    if function.parameters is None:
        return {**NO_ARGUMENTS, "additionalProperties": False}
    return {"type": "object", **(function.parameters if is_strict else {})}


def _variables(dialect: Dialect, request: ChatRequest) -> dict[str, Any]:
    """The template variables that a request sets."""
    field = "chat_template_kwargs"
    given = request.chat_template_kwargs or {}
    for name, value in given.items():
        if name not in dialect.variables:
            known = ", ".join(dialect.variables) or "none"
            raise RequestError(
                f"{field}: '{name}' is no variable that can be set for this model; those are:"
                f" {known}",
                param=f"{field}.{name}",
            )
        allowed = dialect.variables[name]
        if not any(value == option and type(value) is type(option) for option in allowed):
            options = ", ".join(json.dumps(option) for option in allowed)
            raise RequestError(f"{field}.{name} must be one of {options}", param=f"{field}.{name}")
    return dict(given)


def _form(
    dialect: Dialect, request: ChatRequest, tools: list[Tool], thinking: Thinking
) -> StructuredOutput | None:
    """What the answer is held to, reasoning and calls included."""
    field = request.form_field
    reasoning = None
    if dialect.reasoning is not None and thinking != "never":
        marks = dialect.reasoning
        reasoning = ReasoningFirst(open=marks.open, close=marks.close, is_begun=thinking == "begun")
    try:
        if request.structured_outputs is None:
            form = format_output(request.response_format)
        else:
            form = structured_output(request.structured_outputs)
        return forced_output(
            dialect.tokenizer,
            form=form,
            calls=_forced_calls(dialect, request, tools, has_form=form is not None),
            reasoning=reasoning,
        )
    except UserError as error:
        raise RequestError(f"{field}: {error}", param=field) from error


def _forced_calls(
    dialect: Dialect, request: ChatRequest, tools: list[Tool], *, has_form: bool
) -> ForcedCalls | None:
    """What calls are held to; None where they are free, or where there can be none."""
    choice = request.tool_choice
    if dialect.tools is None or not tools:
        return None
    required = choice == "required" or isinstance(choice, NamedTool)
    is_strict = any(tool.function.strict for tool in tools)
    several = request.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    if not (required or has_form or is_strict or not several):
        return None
    functions = [
        CallableFunction(
            name=tool.function.name,
            schema=_held_schema(tool.function, is_strict=required or tool.function.strict is True),
            place=f"tools[{index}].function.parameters",
        )
        for index, tool in enumerate(tools)
        if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name
    ]
    return ForcedCalls(
        format=dialect.tools, functions=functions, several=several, required=required
    )


def check_size(model: Model, texts: Iterable[str], param: str) -> None:
    """Raise RequestError for the field `param` where `texts` cannot fit the model's context."""
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
    most = model.context * model.tokenizer.max_token_bytes
    if size > most:
        raise RequestError(
            f"{param}: a text of {size} bytes cannot fit the context of {model.context} tokens; "
            "shorten it",
            param=param,
            code="context_length_exceeded",
        )
