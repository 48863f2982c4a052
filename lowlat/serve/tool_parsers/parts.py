"""The parts of an answer: what the model says, thinks and calls, in pieces as they become certain.

Owns the records. answer.py and the formats beside this file make them out of text.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentPart:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """What the model thinks before it answers."""

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
    """Add `part`, joined with the last one where both are pieces of one text."""
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
