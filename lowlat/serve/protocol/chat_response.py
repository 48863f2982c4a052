"""Responses of POST /v1/chat/completions: complete, or as chunks of a stream."""

from typing import Literal

from pydantic import Field

from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.usage import Timings, Usage

ChatFinishReason = Literal["stop", "length", "tool_calls"]
"""stop: end of sequence or a stop string; length: max_tokens or the end of the context."""


class TopLogprob(WireModel):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(WireModel):
    token: str
    """The token's text, with U+FFFD for incomplete characters; `bytes` is exact."""
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(WireModel):
    """Log-probabilities before penalties, logit bias, temperature and filters."""

    content: list[ChatLogprob]
    refusal: None = None


class ChatFunctionCall(WireModel):
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


class ChatToolCall(WireModel):
    id: str
    type: Literal["function"] = "function"
    function: ChatFunctionCall


class ChatMessage(WireModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ChatToolCall] | None = Field(default=None, exclude_if=is_none)


class ChatChoice(WireModel):
    index: int
    message: ChatMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatFinishReason


class ChatCompletion(WireModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[ChatChoice]
    usage: Usage
    lowlat: Timings


class FunctionDelta(WireModel):
    name: str | None = Field(default=None, exclude_if=is_none)
    arguments: str | None = Field(default=None, exclude_if=is_none)


class ToolCallDelta(WireModel):
    """The first delta of a call has id, type and name; later ones extend the arguments."""

    index: int
    id: str | None = Field(default=None, exclude_if=is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=is_none)
    function: FunctionDelta


class MessageDelta(WireModel):
    """Increment of a message."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=is_none)


class ChunkChoice(WireModel):
    index: int
    delta: MessageDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinishReason | None = None


class ChatCompletionChunk(WireModel):
    """One chunk of a stream. With include_usage, the last has usage and no choices."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    lowlat: Timings | None = Field(default=None, exclude_if=is_none)
