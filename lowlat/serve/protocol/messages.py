"""Chat messages and tools of requests, in OpenAI's format; text only."""

from typing import Annotated, Literal

from pydantic import Field

from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import (
    Description,
    FunctionName,
    Id,
    JsonSchemaObject,
    Name,
    StrictModel,
)
from lowlat.serve.protocol.hints import Hint, Ignored

CacheControl = Hint[dict[str, object] | None]
"""Anthropic's mark of a prefix to cache; every prefix is cached."""


class Function(StrictModel):
    """A function the model may call."""

    name: FunctionName
    description: Description | None = None
    parameters: JsonSchemaObject | None = None
    """JSON schema of the arguments; None: no arguments."""
    strict: bool | None = None
    """Whether to enforce the schema on the arguments. It is always enforced on forced calls."""


class Tool(StrictModel):
    type: Literal["function"]
    function: Function
    cache_control: CacheControl = None


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: str
    """JSON text of the arguments."""


class ToolCall(StrictModel):
    """A call in an earlier message."""

    id: Id
    type: Literal["function"]
    function: CalledFunction


class NamedFunction(StrictModel):
    name: FunctionName


class NamedTool(StrictModel):
    """Forces a call of this function."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class TextPart(StrictModel):
    """A text part of a message."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl = None


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=limits.MAX_CONTENT_PARTS)]
"""Text, or parts that are concatenated."""


class SystemMessage(StrictModel):
    """Instructions; `developer` is a synonym of `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None
    cache_control: CacheControl = None


class UserMessage(StrictModel):
    """A message of the user."""

    role: Literal["user"]
    content: Content
    name: Name | None = None
    cache_control: CacheControl = None


class AssistantMessage(StrictModel):
    """An earlier output of the model: text, tool calls, or both."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    """The reasoning before the content."""
    name: Name | None = None
    cache_control: CacheControl = None
    tool_calls: Annotated[
        Annotated[list[ToolCall], Field(max_length=limits.MAX_TOOLS)] | None,
        Ignored(when=lambda message: not message.tool_calls),
    ] = None
    # Responses contain these as null or empty, and clients send them back.
    refusal: None = None
    annotations: Annotated[list[str], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(StrictModel):
    """The result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Id
    name: Name | None = None
    cache_control: CacheControl = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def text_of(content: Content | None) -> str:
    """The text of a message; "" if None."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
