"""Tool parser interface: parsing and grammar of a tool-call format.

Each format has its own module.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import ParserState


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFunction:
    """A function for which a grammar of calls is built."""

    name: str
    schema: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    path: str = "tools"
    """Its path in the request, for error messages."""


class ToolParser(ABC):
    """Tool parser of one tool-call format; stateless."""

    markers: ClassVar[tuple[str, ...]]
    """Texts of the format that may be special tokens; `read` needs them in the text."""
    opening: ClassVar[str]
    """The marker that begins every call and nothing else; "": calls look like text."""
    parallel: ClassVar[bool] = True
    """Whether one output may contain several calls."""
    json_arguments: ClassVar[bool] = False
    """Whether templates accept arguments of past calls only as JSON text, not as an object."""
    needs_content: ClassVar[bool] = True
    """Whether templates need "" instead of null as the content of a message with only calls."""

    @abstractmethod
    def read(self, state: ParserState) -> Steps[None]:
        """Parse an output after its reasoning: content and calls, to the end of the text."""

    @abstractmethod
    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        """The grammar of one call, or of several if `parallel`, of any of `functions`.

        It starts after `opening`.
        """

    def new_id(self) -> str:
        """An id for a call whose format has none."""
        return f"call_{secrets.token_hex(12)}"

    def past_id(self, id: str, name: str, number: int) -> str:
        """`id` as templates accept it; the call is number `number` of the chat, of `name`."""
        return id
