"""Prepare a chat request for the engine: prompt ids, sampling params, grammar, output parser.

Rejects fields that the model's chat template does not support. Errors raised by the template itself
(such as "roles must alternate") are passed on.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lowlat.generate import structured
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.chat.constraints import ToolCallConstraint, constrained_output
from lowlat.serve.chat.messages import template_messages
from lowlat.serve.chat.output_parser import OutputParser, ReasoningMode
from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import RequestError, about, context_error
from lowlat.serve.protocol.messages import Function, NamedTool, Tool
from lowlat.serve.tool_parsers.base import ToolFunction
from lowlat.text.chat_prompt import encode_chat
from lowlat.text.pieces import TooManyTokens, encode_prompt_text

TextConstraints = Mapping[str, structured.Regex | structured.Grammar]
NO_ARGUMENTS: dict[str, object] = {"type": "object", "properties": {}}
"""Schema that templates render for a function without parameters, as in training data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedChat:
    """A chat request, ready for the engine."""

    ids: tuple[int, ...]
    """The prompt."""
    params: SamplingParams
    structured: StructuredOutput | None
    """The constraint on the output; None: free text."""
    keep_special: frozenset[int]
    """Special tokens whose text the parser needs."""
    begins_text: bool
    """See CompletionBuilder."""
    make_parser: Callable[[], OutputParser]
    """Creates the parser of one completion."""
    used_hints: frozenset[str]
    """Hints of the request that have an effect with this model's chat template."""

    def with_max_tokens_up_to(self, context: int) -> "PreparedChat":
        """The same with max_tokens reduced to what `context` tokens hold after the prompt."""
        limit = self.params.max_tokens
        if limit is None or len(self.ids) + limit <= context:
            return self
        return replace(self, params=replace(self.params, max_tokens=context - len(self.ids)))


def prepare_chat(
    model: Model, request: ChatRequest, texts: TextConstraints | None = None
) -> PreparedChat:
    """Check `request` against the features of `model` and encode its prompt.

    `texts`: constraints on the inputs of functions that stand for custom tools, by name.
    Raises RequestError about a field this model does not support, UserError for contradictory
    sampling options.
    """
    features = TemplateFeatures.of(model.tokenizer)
    tools = _offered_tools(features, request)
    given = _given_variables(features, request)
    from_hints = features.effort_variables(request.reasoning_effort)
    ids = _encode(model, features, request, tools, {**from_hints, **given})
    _check_length(model, ids)
    thinking = features.thinking(ids)
    constraint = _constraint(features, request, tools, thinking, texts or {})
    if constraint is not None:
        request.check_end()
        if request.continue_final_message:
            raise RequestError(
                "continue_final_message cannot be combined with structured outputs or forced tools;"
                " leave it out",
                param="continue_final_message",
            )
    schemas = {tool.function.name: _schema(tool.function) for tool in tools}
    parser = features.tools if tools else None
    return PreparedChat(
        ids=tuple(ids),
        params=request.to_params(),
        structured=constraint,
        keep_special=features.keep_special(thinking=thinking, tools=bool(tools)),
        begins_text=not request.continue_final_message,
        make_parser=lambda: OutputParser(
            marks=features.reasoning, thinking=thinking, tools=parser, schemas=schemas
        ),
        used_hints=frozenset({"reasoning_effort"} if from_hints.keys() - given.keys() else ()),
    )


def encode_prompt(model: Model, request: ChatRequest) -> list[int]:
    """The prompt of `request`, which may be longer than the context."""
    features = TemplateFeatures.of(model.tokenizer)
    variables = {
        **features.effort_variables(request.reasoning_effort),
        **_given_variables(features, request),
    }
    tools = _offered_tools(features, request)
    return _encode(model, features, request, tools, variables, limits.MAX_PROMPT_TOKENS)


def _offered_tools(features: TemplateFeatures, request: ChatRequest) -> list[Tool]:
    """The functions that the template presents to the model."""
    if not request.tools or request.tool_choice == "none":
        return []
    if features.tools is None:
        raise RequestError(
            "tools: this model's chat template has no known tool-call format; leave them out",
            param="tools",
        )
    return request.tools


def _encode(
    model: Model,
    features: TemplateFeatures,
    request: ChatRequest,
    tools: list[Tool],
    variables: dict[str, Any],
    most: int | None = None,
) -> list[int]:
    messages = template_messages(features, request.messages)
    described = [_described(tool.function) for tool in tools] or None
    with about("messages"):
        return encode_chat(
            model.tokenizer,
            messages,
            tools=described,
            continues=request.continue_final_message is True,
            encode=partial(
                encode_text, model, param="messages", most=most, add_special_tokens=False
            ),
            add_generation_prompt=request.add_generation_prompt is not False,
            **variables,
        )


def _check_length(model: Model, ids: Sequence[int]) -> None:
    if not ids:
        raise RequestError("messages: the prompt has no tokens; send text", param="messages")
    if len(ids) >= model.context:
        raise context_error(
            model.context,
            f"The prompt of messages has {len(ids)} tokens, and one must be left for the answer; "
            "shorten the conversation",
            param="messages",
        )


def _described(function: Function) -> dict[str, Any]:
    shown: dict[str, Any] = {"name": function.name}
    if function.description is not None:
        shown["description"] = function.description
    return {"type": "function", "function": {**shown, "parameters": _schema(function)}}


def _schema(function: Function) -> dict[str, object]:
    return NO_ARGUMENTS if function.parameters is None else function.parameters


def _enforced_schema(function: Function, *, is_strict: bool) -> dict[str, object]:
    if function.parameters is None:
        return {**NO_ARGUMENTS, "additionalProperties": False}
    return {"type": "object", **(function.parameters if is_strict else {})}


def _given_variables(features: TemplateFeatures, request: ChatRequest) -> dict[str, Any]:
    field = "chat_template_kwargs"
    given = request.chat_template_kwargs or {}
    for name, value in given.items():
        if name not in features.variables:
            known = ", ".join(features.variables) or "none"
            raise RequestError(
                f"{field}: '{name}' is not a variable of the chat template; it has: {known}",
                param=f"{field}.{name}",
            )
        allowed = features.variables[name]
        if not any(value == option and type(value) is type(option) for option in allowed):
            options = ", ".join(json.dumps(option) for option in allowed)
            raise RequestError(f"{field}.{name} must be one of {options}", param=f"{field}.{name}")
    return dict(given)


def _constraint(
    features: TemplateFeatures,
    request: ChatRequest,
    tools: list[Tool],
    thinking: ReasoningMode,
    texts: TextConstraints,
) -> StructuredOutput | None:
    """The constraint on the whole output, including reasoning and tool calls."""
    format = request.response_format
    with about(request.constraint_field):
        output = request.guided_output() or (None if format is None else format.to_output())
        calls = _tool_call_constraint(
            features, request, tools, texts, is_structured=output is not None
        )
        return constrained_output(
            features.tokenizer,
            output=output,
            calls=calls,
            marks=features.reasoning,
            thinking=thinking,
        )


def _tool_call_constraint(
    features: TemplateFeatures,
    request: ChatRequest,
    tools: list[Tool],
    texts: TextConstraints,
    *,
    is_structured: bool,
) -> ToolCallConstraint | None:
    """The constraint on tool calls; None: calls are free, or no tools are offered."""
    choice = request.tool_choice
    if features.tools is None or not tools:
        return None
    required = choice == "required" or isinstance(choice, NamedTool)
    is_strict = bool(texts) or any(tool.function.strict for tool in tools)
    parallel = request.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    if not (required or is_structured or is_strict or not parallel):
        return None
    functions = [
        ToolFunction(
            name=tool.function.name,
            schema=_enforced_schema(
                tool.function, is_strict=required or tool.function.strict is True
            ),
            path=f"tools[{index}].function.parameters",
            text=texts.get(tool.function.name),
        )
        for index, tool in enumerate(tools)
        if not isinstance(choice, NamedTool) or tool.function.name == choice.function.name
    ]
    return ToolCallConstraint(
        format=features.tools, functions=functions, parallel=parallel, required=required
    )


def encode_text(
    model: Model,
    text: str,
    param: str,
    *,
    most: int | None = None,
    add_special_tokens: bool = True,
    parse_special: bool = True,
) -> list[int]:
    """Token ids of a text. Raises RequestError about the field `param` for one of more than `most`
    tokens (by default the context), mostly before it is tokenized.

    A token covers at most `max_token_bytes` bytes, which bounds the text.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > model.context * model.tokenizer.max_token_bytes:
        raise context_error(
            model.context, f"The text of {param} has {size} bytes; shorten it", param=param
        )
    try:
        return encode_prompt_text(
            model.tokenizer,
            text,
            most or model.context,
            add_special_tokens=add_special_tokens,
            parse_special=parse_special,
        )
    except TooManyTokens as error:
        raise context_error(model.context, f"{param}: {error}", param=param) from error
