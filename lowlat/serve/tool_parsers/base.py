"""ToolFormat: what is to be known about one way of writing tool calls.

Owns the interface alone; each format is a file beside this one.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowlat.serve.tool_parsers.lark import Lark, Rule
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import Calls


@dataclass(frozen=True, kw_only=True, slots=True)
class Function:
    """A function as a grammar needs it."""

    name: str
    schema: Mapping[str, Any]
    """JSON schema of the arguments, which is an object's."""
    place: str = "tools"
    """Where it stands in the request, for what is said about it."""


class ToolFormat(ABC):
    """One way of writing calls; it holds no state."""

    markers: ClassVar[tuple[str, ...]]
    """Texts of the format that may be control tokens; `read` needs to see them."""
    opening: ClassVar[str]
    """The one of them with which calls begin, and nothing else does; "": calls look like text."""
    several: ClassVar[bool] = True
    """Whether one answer may hold more than one call."""
    text_arguments: ClassVar[bool] = False
    """Whether templates take the arguments of past calls as JSON text only, not as an object."""
    needs_content: ClassVar[bool] = True
    """Whether templates take "" for the content of an answer that was calls alone, not null."""

    @abstractmethod
    def read(self, calls: Calls) -> Steps[None]:
        """Read a whole answer after its reasoning: content and calls, to the end of the text."""

    @abstractmethod
    def rule(self, grammar: Lark, functions: Sequence[Function], *, several: bool) -> Rule:
        """The grammar of one call, or of `several`, of any of `functions`.

        It begins after the opening, where the format has one.
        """

    def new_id(self) -> str:
        """An id for a call the model gave none."""
        return f"call_{secrets.token_hex(12)}"

    def past_id(self, id: str, name: str, number: int) -> str:
        """The id that templates take for `id`, the conversation's call `number`, of `name`."""
        return id
