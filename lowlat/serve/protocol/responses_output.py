"""Responses of POST /v1/responses: the response object, its output items and stream events."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lowlat.serve.protocol.base import WireModel
from lowlat.serve.protocol.responses import (
    FlatFunction,
    FlatNamedTool,
    ItemStatus,
    TextFormatChoice,
)


class OutputTextPart(WireModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = Field(default_factory=list)
    logprobs: list[str] = Field(default_factory=list)


class ReasoningTextPart(WireModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class MessageItem(WireModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"
    content: list[OutputTextPart] = Field(default_factory=list)


class ReasoningItem(WireModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[str] = Field(default_factory=list)
    status: ItemStatus = "in_progress"
    content: list[ReasoningTextPart] = Field(default_factory=list)


class FunctionCallItem(WireModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = MessageItem | ReasoningItem | FunctionCallItem


class InputDetails(WireModel):
    cached_tokens: int


class OutputDetails(WireModel):
    reasoning_tokens: int
    """Tokens of the reasoning."""


class ResponseUsage(WireModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(WireModel):
    reason: Literal["max_output_tokens"]


class TextSettings(WireModel):
    format: TextFormatChoice


class ResponseError(WireModel):
    code: str
    message: str


class ResponseObject(WireModel):
    """The output and the settings of a response."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    """Unix time in seconds."""
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None = None
    store: Literal[False] = False
    temperature: float
    text: TextSettings
    tool_choice: Literal["none", "auto", "required"] | FlatNamedTool
    tools: list[FlatFunction]
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None


class ResponseEvent(BaseModel):
    """An event of a stream; its other fields depend on the type, as in OpenAI's API."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int
