"""Parts of a parsed output: pieces of content, reasoning and tool calls.

`chat.output_parser` and the tool parsers produce them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentPart:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """Reasoning before the content."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins; its arguments follow in ToolCallArguments of the same index."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A piece of the JSON text of the arguments of call `index`."""

    index: int
    text: str


Part = ContentPart | ReasoningPart | ToolCallStart | ToolCallArguments


def append_part(parts: list[Part], part: Part) -> None:
    """Append `part`, merged with the last one if both are pieces of the same text."""
    last = parts[-1] if parts else None
    match last, part:
        case (ContentPart(a), ContentPart(b)):
            parts[-1] = ContentPart(a + b)
        case (ReasoningPart(a), ReasoningPart(b)):
            parts[-1] = ReasoningPart(a + b)
        case (ToolCallArguments(i, a), ToolCallArguments(j, b)) if i == j:
            parts[-1] = ToolCallArguments(i, a + b)
        case _:
            parts.append(part)
