"""Chat messages as requests hold them. Text only; roles and fields are OpenAI's."""

from typing import Annotated, Literal

from pydantic import Field

from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import Id, Name, StrictModel
from lowlat.serve.protocol.tools import ToolCall


class TextPart(StrictModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1, max_length=limits.MAX_CONTENT_PARTS)]
"""Text, or parts that are joined without anything between."""


class SystemMessage(StrictModel):
    """What the model should be like; `developer` means the same."""

    role: Literal["system", "developer"]
    content: Content
    name: Name | None = None


class UserMessage(StrictModel):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: Name | None = None


class AssistantMessage(StrictModel):
    """An earlier answer: text, tool calls, or both."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    """What the model thought before it answered."""
    name: Name | None = None
    tool_calls: (
        Annotated[list[ToolCall], Field(min_length=1, max_length=limits.MAX_TOOLS)] | None
    ) = None
    # Answers carry these as null (or empty), and clients send them back as they came.
    refusal: None = None
    annotations: Annotated[list[str], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(StrictModel):
    """What a tool call returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Id
    name: Name | None = None


Message = Annotated[
    SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")
]


def text_of(content: Content | None) -> str:
    """The text of a message; "" for none."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
