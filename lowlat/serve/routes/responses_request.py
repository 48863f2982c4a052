"""ResponsesRequest: the body of POST /v1/responses, and its conversion to a chat request.

The text subset of OpenAI's Responses API. Items and tools are in `protocol.response_items`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from lowlat.serve.chat.freeform import arguments_of
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
from lowlat.serve.protocol.response_items import (
    CustomToolCall,
    CustomToolCallOutput,
    FlatNamedTool,
    FunctionCall,
    FunctionCallOutput,
    InputItem,
    InputMessage,
    Reasoning,
    ResponseTool,
    text_of_items,
)
from lowlat.serve.protocol.sampling import HintText, MaxTokens, Metadata, ReasoningEffort
from lowlat.serve.protocol.structured_outputs import JsonObjectFormat, TextFormat
from lowlat.serve.protocol.validation import validate
from lowlat.serve.routes.response_tools import ChatTools, chat_tools, flat_name


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
        Annotated[list[ResponseTool], Field(max_length=limits.MAX_TOOLS)] | None,
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
    store: bool | None = None
    """Whether later requests may continue this response, as long as memory allows. Default true."""
    previous_response_id: Id | None = None
    """A stored response, whose input and output precede the input."""
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
    conversation: None = None

    @model_validator(mode="after")
    def _check(self) -> "ResponsesRequest":
        if isinstance(self.input, list) and isinstance(self.input[-1], Reasoning):
            raise RequestError("input must not end with reasoning", param="input")
        return self

    @property
    def items(self) -> list[InputItem]:
        """The input as items."""
        if isinstance(self.input, list):
            return self.input
        return [InputMessage(type="message", role="user", content=self.input)]


def as_chat(
    request: ResponsesRequest, earlier: Sequence[InputItem] = ()
) -> tuple[ChatRequest, ChatTools]:
    """`request` as a chat after the `earlier` items, and its tools.

    Raises RequestError if it exceeds a limit of chats.
    """
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    for item in (*earlier, *request.items):
        _add(messages, item)
    if len(messages) > limits.MAX_MESSAGES:
        raise RequestError(
            f"input: more than {limits.MAX_MESSAGES} messages, instructions and earlier responses"
            " included",
            param="input",
        )
    tools = chat_tools(request.tools or ())
    format, choice = request.text and request.text.format, request.tool_choice
    if isinstance(choice, FlatNamedTool):
        choice = {"type": "function", "function": {"name": choice.name}}
    chat = {
        "model": request.model,
        "messages": messages,
        "max_completion_tokens": request.max_output_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "tools": tools.functions or None,
        "tool_choice": choice,
        "parallel_tool_calls": request.parallel_tool_calls,
        "reasoning_effort": request.reasoning and request.reasoning.effort,
        "response_format": _nested(format) if isinstance(format, FlatSchemaFormat) else format,
    }
    return validate(ChatRequest, chat), tools


def _nested(format: FlatSchemaFormat) -> dict[str, Any]:
    """The format as chats have it: all fields but the type inside the field json_schema."""
    fields = format.model_dump(by_alias=True, exclude={"type"})
    return {"type": format.type, "json_schema": fields}


def _add(messages: list[dict[str, Any]], item: InputItem) -> None:
    """Append an item; reasoning, text and calls in a row form one assistant message."""
    match item:
        case FunctionCallOutput() | CustomToolCallOutput():
            content = text_of_items(item.output)
            messages.append({"role": "tool", "content": content, "tool_call_id": item.call_id})
        case FunctionCall():
            _add_call(messages, item, item.arguments)
        case CustomToolCall():
            _add_call(messages, item, arguments_of(item.input))
        case Reasoning():
            parts = item.content or item.summary or ()
            if thought := "".join(part.text for part in parts):
                messages.append({"role": "assistant", "reasoning_content": thought})
        case InputMessage():
            content = text_of_items(item.content)
            if item.role != "assistant":
                messages.append({"role": item.role, "content": content})
            elif {"content", "tool_calls"} & _assistant(messages).keys():
                messages.append({"role": "assistant", "content": content})
            else:
                messages[-1]["content"] = content


def _add_call(
    messages: list[dict[str, Any]], item: FunctionCall | CustomToolCall, arguments: str
) -> None:
    name = flat_name(item.namespace, item.name, "input")
    function = {"name": name, "arguments": arguments}
    calls = _assistant(messages).setdefault("tool_calls", [])
    calls.append({"id": item.call_id, "type": "function", "function": function})
    if len(calls) > limits.MAX_TOOLS:
        raise RequestError(
            f"input: more than {limits.MAX_TOOLS} function calls in a row", param="input"
        )


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message, an assistant's; appends one if another role has spoken last."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]
