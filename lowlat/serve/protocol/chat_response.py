"""The answer to a chat: whole, or as the chunks of a stream."""

from typing import Literal

from pydantic import Field

from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.usage import Timings, Usage

ChatFinish = Literal["stop", "length", "tool_calls"]
"""stop: end of sequence or a stop string; length: max_tokens or the context's end."""


class TopLogprob(WireModel):
    token: str
    logprob: float
    bytes: list[int]


class AnswerLogprob(WireModel):
    token: str
    """The token's text; U+FFFD stands for parts of a character, which `bytes` has exactly."""
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(WireModel):
    """Log-probabilities under the model, before penalties, bias, temperature and filters."""

    content: list[AnswerLogprob]
    refusal: None = None


class AnswerFunction(WireModel):
    name: str
    arguments: str
    """JSON text, as the model wrote it."""


class AnswerToolCall(WireModel):
    id: str
    type: Literal["function"] = "function"
    function: AnswerFunction


class AnswerMessage(WireModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[AnswerToolCall] | None = Field(default=None, exclude_if=is_none)


class ChatChoice(WireModel):
    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: ChatFinish


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
    """The first of a call has id, type and name; the others add to the arguments."""

    index: int
    id: str | None = Field(default=None, exclude_if=is_none)
    type: Literal["function"] | None = Field(default=None, exclude_if=is_none)
    function: FunctionDelta


class MessageDelta(WireModel):
    """What a message gained."""

    role: Literal["assistant"] | None = Field(default=None, exclude_if=is_none)
    content: str | None = Field(default=None, exclude_if=is_none)
    reasoning_content: str | None = Field(default=None, exclude_if=is_none)
    tool_calls: list[ToolCallDelta] | None = Field(default=None, exclude_if=is_none)


class ChunkChoice(WireModel):
    index: int
    delta: MessageDelta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: ChatFinish | None = None


class ChatChunk(WireModel):
    """One event of a stream. The last has no choices but the usage, where that was asked for."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    lowlat: Timings | None = Field(default=None, exclude_if=is_none)
