"""MessagesRequest: the body of POST /v1/messages (Anthropic's API), and its conversion to a chat.

Text, thinking, tool calls and their results; images, documents and server tools are rejected.
"""

import json
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lowlat.serve.chat.template_features import SWITCHES, TemplateFeatures
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import (
    ApiRequest,
    Description,
    FunctionName,
    GenerationRequest,
    Id,
    JsonSchemaObject,
    StrictModel,
)
from lowlat.serve.protocol.chat import ChatRequest
from lowlat.serve.protocol.hints import Hint, Ignored, TemplateHint
from lowlat.serve.protocol.messages import CacheControl
from lowlat.serve.protocol.sampling import HintText, MaxTokens, ReasoningEffort, StopString
from lowlat.serve.protocol.validation import validate

BILLING = "x-anthropic-billing-header:"
"""Begins a system block of Claude Code that is no instruction, and differs between sessions."""
Json = dict[str, object]
Empty = Annotated[list[str], Field(max_length=0)]


class TextBlock(StrictModel):
    type: Literal["text"]
    text: str
    citations: Empty | None = None
    cache_control: CacheControl = None


class ThinkingBlock(StrictModel):
    """Reasoning of an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(StrictModel):
    """A tool call of an earlier answer."""

    type: Literal["tool_use"]
    id: Id
    name: FunctionName
    input: dict[str, object]
    caller: Hint[Json | None] = None
    cache_control: CacheControl = None


Texts = str | Annotated[list[TextBlock], Field(max_length=limits.MAX_CONTENT_PARTS)]


class ToolResultBlock(StrictModel):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Texts | None = None
    is_error: bool | None = None
    cache_control: CacheControl = None


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]


class UserTurn(StrictModel):
    role: Literal["user"]
    content: str | Annotated[list[UserBlock], Field(max_length=limits.MAX_CONTENT_PARTS)]


class AssistantTurn(StrictModel):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantBlock], Field(max_length=limits.MAX_CONTENT_PARTS)]


class SystemTurn(StrictModel):
    """Instructions within the conversation."""

    role: Literal["system"]
    content: Texts


Turn = Annotated[UserTurn | AssistantTurn | SystemTurn, Field(discriminator="role")]


class ClientTool(StrictModel):
    """A function the model may call."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: Description | None = None
    input_schema: JsonSchemaObject
    strict: bool | None = None
    eager_input_streaming: Hint[bool | None] = None
    cache_control: CacheControl = None


class AutoChoice(StrictModel):
    type: Literal["auto"]
    disable_parallel_tool_use: bool | None = None


class AnyChoice(StrictModel):
    """Forces a call."""

    type: Literal["any"]
    disable_parallel_tool_use: bool | None = None


class NamedChoice(StrictModel):
    """Forces a call of this function."""

    type: Literal["tool"]
    name: FunctionName
    disable_parallel_tool_use: bool | None = None


class NoChoice(StrictModel):
    type: Literal["none"]


ToolChoice = Annotated[AutoChoice | AnyChoice | NamedChoice | NoChoice, Field(discriminator="type")]


class ThinkingOptions(StrictModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Hint[Annotated[int, Field(ge=1)] | None] = None
    """The model decides how long it reasons."""
    display: Hint[Literal["summarized", "omitted"] | None] = None
    """Reasoning is returned as the model wrote it."""


class SchemaFormat(StrictModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    schema_: Annotated[JsonSchemaObject, Field(alias="schema")]


class OutputOptions(StrictModel):
    effort: TemplateHint[ReasoningEffort | None] = None
    format: SchemaFormat | None = None


class CountTokensRequest(ApiRequest):
    """A conversation whose tokens are counted."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    system: Texts | None = None
    tools: Annotated[list[ClientTool], Field(max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: Annotated[ToolChoice | None, Ignored(when=lambda given: not given.tools)] = None
    thinking: TemplateHint[ThinkingOptions | None] = None
    """Turns reasoning on or off if the chat template can."""
    output_config: OutputOptions | None = None
    cache_control: CacheControl = None
    context_management: Hint[Json | None] = None
    """Nothing is removed from the conversation."""


class MessagesRequest(CountTokensRequest, GenerationRequest):
    """A conversation to continue. Null means the default."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"container", "mcp_servers"})

    max_tokens: MaxTokens
    """Maximum number of generated tokens, reasoning included; reduced to what the context holds."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=16)] | None = None
    metadata: Hint[Json | None] = None
    service_tier: Hint[HintText | None] = None
    inference_geo: Hint[HintText | None] = None
    speed: Hint[HintText | None] = None
    diagnostics: Hint[Json | None] = None


FIELDS = {
    "messages": "messages",
    "prompt": "messages",
    "max_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "continue_final_message": "messages",
    "reasoning_effort": "output_config.effort",
    "chat_template_kwargs": "thinking",
    "tools": "tools",
}
"""Chat field -> field of this API."""


def as_chat(features: TemplateFeatures, request: CountTokensRequest) -> ChatRequest:
    """`request` as a chat. Raises RequestError if it exceeds a limit of chats."""
    chat: dict[str, Any] = {
        "model": request.model,
        "messages": _messages(features, request),
        "chat_template_kwargs": _switches(features, request) or None,
        "reasoning_effort": request.output_config and request.output_config.effort,
    }
    chat |= _tools(request)
    if request.output_config is not None and request.output_config.format is not None:
        schema = {"name": "output", "schema": request.output_config.format.schema_}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    if isinstance(request, MessagesRequest):
        if isinstance(request.messages[-1], AssistantTurn):
            chat |= {"continue_final_message": True, "add_generation_prompt": False}
        chat |= request.model_dump(include={"max_tokens", "temperature", "top_p", "top_k"})
        chat["stop"] = request.stop_sequences
    return validate(ChatRequest, chat)


def _tools(request: CountTokensRequest) -> dict[str, Any]:
    """The chat's fields about tools."""
    choice = request.tool_choice
    if not request.tools:
        # "auto" and "none" choose nothing then; a forced call is an error of the chat.
        return {"tool_choice": "required" if isinstance(choice, AnyChoice | NamedChoice) else None}
    fields: dict[str, Any] = {"tools": [_function(tool) for tool in request.tools]}
    match choice:
        case NamedChoice():
            fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
        case AnyChoice():
            fields["tool_choice"] = "required"
        case AutoChoice() | NoChoice():
            fields["tool_choice"] = choice.type
    if not isinstance(choice, NoChoice | None) and choice.disable_parallel_tool_use:
        fields["parallel_tool_calls"] = False
    return fields


def _function(tool: ClientTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _switches(features: TemplateFeatures, request: CountTokensRequest) -> dict[str, bool]:
    """The chat template's variables that `thinking` sets."""
    if request.thinking is None:
        return {}
    switches = features.variables.keys() & set(SWITCHES)
    return dict.fromkeys(switches, request.thinking.type != "disabled")


def _messages(features: TemplateFeatures, request: CountTokensRequest) -> list[dict[str, Any]]:
    conversation = _Conversation(features)
    if request.system is not None:
        conversation.add_system(_text(request.system))
    for message in request.messages:
        conversation.add(message)
    return conversation.messages


def _text(content: Texts | None) -> str:
    """Texts, one per line; without Claude Code's billing header."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = (block.text for block in content)
    return "\n".join(text for text in texts if not text.startswith(BILLING))


class _Conversation:
    """Messages of a chat; consecutive turns of one role form one message."""

    def __init__(self, features: TemplateFeatures) -> None:
        self.messages: list[dict[str, Any]] = []
        self._features = features

    def add(self, given: UserTurn | AssistantTurn | SystemTurn) -> None:
        match given:
            case SystemTurn():
                self.add_system(_text(given.content))
            case UserTurn(content=str(text)):
                self._add_text("user", text)
            case AssistantTurn(content=str(text)):
                self._add_answer([TextBlock(type="text", text=text)])
            case UserTurn():
                for block in given.content:
                    assert not isinstance(block, str)
                    self._add_user_block(block)
            case AssistantTurn():
                self._add_answer(block for block in given.content if not isinstance(block, str))

    def add_system(self, text: str) -> None:
        """Instructions. After the first message many templates render none, then they become a
        reminder in the user's message, as Claude Code writes it itself.
        """
        if not text:
            return
        if not self.messages or self._features.supports_later_system:
            self._add_text("system", text)
        else:
            self._add_text("user", f"<system-reminder>\n{text}\n</system-reminder>")

    def _add_text(self, role: str, text: str) -> None:
        if self.messages and self.messages[-1]["role"] == role:
            self.messages[-1]["content"] += f"\n{text}"
        else:
            self.messages.append({"role": role, "content": text})

    def _add_user_block(self, block: TextBlock | ToolResultBlock) -> None:
        if isinstance(block, TextBlock):
            self._add_text("user", block.text)
            return
        text = _text(block.content)
        result = {"content": f"Error: {text}" if block.is_error else text}
        self.messages.append({"role": "tool", **result, "tool_call_id": block.tool_use_id})

    def _add_answer(self, blocks: Iterable[TextBlock | ThinkingBlock | ToolUseBlock]) -> None:
        if not self.messages or self.messages[-1]["role"] != "assistant":
            self.messages.append({"role": "assistant"})
        answer = self.messages[-1]
        for block in blocks:
            match block:
                case TextBlock():
                    answer["content"] = answer.get("content", "") + block.text
                case ThinkingBlock():
                    earlier = answer.get("reasoning_content", "")
                    answer["reasoning_content"] = earlier + block.thinking
                case ToolUseBlock():
                    arguments = json.dumps(block.input, ensure_ascii=False)
                    function = {"name": block.name, "arguments": arguments}
                    call = {"id": block.id, "type": "function", "function": function}
                    answer.setdefault("tool_calls", []).append(call)
