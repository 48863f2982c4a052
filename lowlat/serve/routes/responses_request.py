"""ResponsesRequest: the body of POST /v1/responses, and its conversion to a chat request.

The text subset of OpenAI's Responses API. Nothing is stored, so fields that refer to an earlier
response are rejected by name.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import (
    Description,
    FunctionName,
    GenerationRequest,
    Id,
    JsonSchemaObject,
    OnlyFalse,
    StrictModel,
)
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.hints import Hint, Ignored, TemplateHint
from lowlat.serve.protocol.messages import CacheControl
from lowlat.serve.protocol.sampling import HintText, MaxTokens, Metadata, ReasoningEffort
from lowlat.serve.protocol.structured_outputs import JsonObjectFormat, TextFormat
from lowlat.serve.protocol.validation import UNKNOWN_KIND, validate

Nothing = Annotated[list[str], Field(max_length=0)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(StrictModel):
    type: Literal["input_text"]
    text: str
    cache_control: CacheControl = None


class OutputText(StrictModel):
    """A text part of an earlier output."""

    type: Literal["output_text"]
    text: str
    annotations: Nothing | None = None
    logprobs: Nothing | None = None
    cache_control: CacheControl = None


TextItem = Annotated[InputText | OutputText, Field(discriminator="type")]


class InputMessage(StrictModel):
    """A message of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: (
        str | Annotated[list[TextItem], Field(min_length=1, max_length=limits.MAX_CONTENT_PARTS)]
    )
    id: Id | None = None
    status: ItemStatus | None = None
    phase: None = None


class FunctionCall(StrictModel):
    """A function call of an earlier output."""

    type: Literal["function_call"]
    call_id: Id
    name: FunctionName
    arguments: str
    id: Id | None = None
    status: ItemStatus | None = None


class FunctionCallOutput(StrictModel):
    """The result of a function call."""

    type: Literal["function_call_output"]
    call_id: Id
    output: str
    id: Id | None = None
    status: ItemStatus | None = None


class ReasoningText(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class Reasoning(StrictModel):
    """The reasoning before the output that follows."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Nothing | None = None
    content: Annotated[list[ReasoningText], Field(max_length=limits.MAX_CONTENT_PARTS)]
    encrypted_content: None = None
    status: ItemStatus | None = None


def _kind_of(item: object) -> str | None:
    """The type of an input item; messages may omit it."""
    if not isinstance(item, dict):
        return None
    kind = item.get("type", "message")
    return "message" if kind is None else kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(
        _kind_of,
        custom_error_type=UNKNOWN_KIND,
        custom_error_message=("must be message, function_call, function_call_output or reasoning"),
    ),
]


class FlatFunction(StrictModel):
    """A function the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: Description | None = None
    parameters: JsonSchemaObject | None = None
    strict: bool | None = None


class FlatNamedTool(StrictModel):
    """Forces a call of this function."""

    type: Literal["function"]
    name: FunctionName


class FlatSchemaFormat(StrictModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    name: FunctionName
    schema_: Annotated[JsonSchemaObject, Field(alias="schema")]
    description: Description | None = None
    strict: bool | None = None


TextFormatChoice = Annotated[
    TextFormat | JsonObjectFormat | FlatSchemaFormat, Field(discriminator="type")
]


class TextOptions(StrictModel):
    format: TextFormatChoice | None = None
    verbosity: Hint[HintText | None] = None


class ReasoningOptions(StrictModel):
    effort: TemplateHint[ReasoningEffort | None] = None
    """Turns reasoning on or off if the chat template can; none and minimal turn it off."""
    summary: Hint[HintText | None] = None
    generate_summary: Hint[HintText | None] = None


class ResponseStreamOptions(StrictModel):
    include_obfuscation: Hint[bool | None] = None


Included = Literal[
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
]
"""Additions to kinds of items that no output contains."""


class ResponsesRequest(GenerationRequest):
    """A response to generate. Null means the default."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"prompt", "top_logprobs"})

    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    """The user's message, or the conversation so far."""
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: MaxTokens | None = None
    """Maximum number of generated tokens, reasoning included; default: the rest of the context."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    text: TextOptions | None = None
    """The output format."""
    tools: Annotated[
        Annotated[list[FlatFunction], Field(max_length=limits.MAX_TOOLS)] | None,
        Ignored(when=lambda given: not given.tools),
    ] = None
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | FlatNamedTool | None,
        Ignored(when=lambda given: not given.tools),
    ] = None
    parallel_tool_calls: Annotated[bool | None, Ignored(when=lambda given: not given.tools)] = None
    max_tool_calls: Hint[Annotated[int, Field(ge=1)] | None] = None
    """Limits calls of tools that the server executes; it executes none."""
    metadata: Metadata | None = None
    """Returned in the response."""
    user: Hint[HintText | None] = None
    safety_identifier: Hint[HintText | None] = None
    store: OnlyFalse | None = None
    """Nothing is stored."""
    background: OnlyFalse | None = None
    service_tier: Hint[HintText | None] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, Ignored(when=lambda given: given.truncation == "auto")
    ] = None
    """A conversation that exceeds the context is rejected."""
    include: Annotated[
        Annotated[list[Included], Field(max_length=16)] | None,
        Ignored(when=lambda given: bool(given.include)),
    ] = None
    reasoning: ReasoningOptions | None = None
    stream_options: ResponseStreamOptions | None = None
    prompt_cache_key: Hint[HintText | None] = None
    prompt_cache_retention: Hint[HintText | None] = None
    client_metadata: Hint[dict[str, object] | None] = None
    previous_response_id: None = None
    conversation: None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponsesRequest":
        if isinstance(self.input, list) and isinstance(self.input[-1], Reasoning):
            raise RequestError("input must not end with reasoning", param="input")
        return self


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """`request` as a chat. Raises RequestError if it exceeds a limit of chats."""
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        messages.append({"role": "user", "content": request.input})
    else:
        for item in request.input:
            _add(messages, item)
    if len(messages) > limits.MAX_MESSAGES:
        raise RequestError(
            f"input: more than {limits.MAX_MESSAGES} messages, instructions included",
            param="input",
        )
    format, choice = request.text and request.text.format, request.tool_choice
    if isinstance(choice, FlatNamedTool):
        choice = _nested(choice, "function")
    chat = {
        "model": request.model,
        "messages": messages,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tools": [_nested(tool, "function") for tool in request.tools or ()] or None,
        "tool_choice": choice,
        "parallel_tool_calls": request.parallel_tool_calls if request.tools else None,
        "reasoning_effort": request.reasoning and request.reasoning.effort,
        "response_format": (
            _nested(format, "json_schema") if isinstance(format, FlatSchemaFormat) else format
        ),
    }
    return validate(ChatRequest, chat)


def _nested(flat: FlatFunction | FlatNamedTool | FlatSchemaFormat, name: str) -> dict[str, Any]:
    """An object of this API as chats have it: all fields but the type inside the field `name`."""
    return {"type": flat.type, name: flat.model_dump(by_alias=True, exclude={"type"})}


def _add(messages: list[dict[str, Any]], item: InputItem) -> None:
    """Append an item; reasoning, text and calls in a row form one assistant message."""
    match item:
        case FunctionCallOutput():
            messages.append({"role": "tool", "content": item.output, "tool_call_id": item.call_id})
        case FunctionCall():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            calls = _assistant(messages).setdefault("tool_calls", [])
            calls.append(call)
            if len(calls) > limits.MAX_TOOLS:
                raise RequestError(
                    f"input: more than {limits.MAX_TOOLS} function calls in a row", param="input"
                )
        case Reasoning():
            thought = "".join(part.text for part in item.content)
            messages.append({"role": "assistant", "reasoning_content": thought})
        case InputMessage():
            content = item.content
            if not isinstance(content, str):
                content = "".join(part.text for part in content)
            if item.role != "assistant":
                messages.append({"role": item.role, "content": content})
            elif {"content", "tool_calls"} & _assistant(messages).keys():
                messages.append({"role": "assistant", "content": content})
            else:
                messages[-1]["content"] = content


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message, an assistant's; appends one if another role has spoken last."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]
