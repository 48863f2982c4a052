"""Tool parser interface (function calling): parsing and grammar of a tool-call format.

Each format has its own module.
"""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowlat.generate import structured
from lowlat.serve.tool_parsers.lark import LarkBuilder, Rule
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import ParserState

NAME = "<function name>"
"""Place of the function's name in a text of a format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolFunction:
    """A function for which a grammar of calls is built."""

    name: str
    schema: Mapping[str, Any]
    """JSON schema of the arguments, an object."""
    path: str = "tools"
    """Its path in the request, for error messages."""
    text: structured.Regex | structured.Grammar | None = None
    """Constraint on the only argument, `input`, of a custom tool."""


class ToolParser(ABC):
    """Tool parser of one tool-call format; stateless.

    The grammar of an output's calls is `before_calls`, calls with the texts `between` them, and
    `after_calls`; that of a call is `before_call`, its `body` and `after_call`.
    """

    markers: ClassVar[tuple[str, ...]]
    """Texts of the format that may be special tokens; `read` needs them in the text. The first one
    begins calls.
    """
    is_marked: ClassVar[bool] = True
    """Whether the first marker begins every call; otherwise a call may look like text."""
    parallel: ClassVar[bool] = True
    """Whether one output may contain several calls."""
    json_arguments: ClassVar[bool] = False
    """Whether templates accept arguments of past calls only as JSON text, not as an object."""
    needs_content: ClassVar[bool] = True
    """Whether templates need "" instead of null as the content of a message with only calls."""
    before_calls: ClassVar[tuple[str, ...]] = ()
    before_call: ClassVar[tuple[str, ...]] = ()
    after_call: ClassVar[tuple[str, ...]] = ()
    between: ClassVar[tuple[str, ...]] = ()
    after_calls: ClassVar[tuple[str, ...]] = ()

    @property
    def opening(self) -> str:
        """The marker that begins every call and nothing else; "": calls look like text."""
        return self.markers[0] if self.is_marked else ""

    def read(self, state: ParserState) -> Steps[None]:
        """Parse an output after its reasoning: content and calls, to the end of the text."""
        if not self.is_marked:
            opening = yield from state.reader.accept_after_space("", keep="{")
            if opening is not None:
                yield from state.attempt(opening, self.read_calls(state))
        while (opening := (yield from state.content_until(self.markers[0]))) is not None:
            yield from state.attempt(opening, self.read_calls(state))

    @abstractmethod
    def read_calls(self, state: ParserState) -> Steps[None]:
        """Parse the calls that follow the first marker. Raises Malformed if they are none."""

    def rule(
        self, grammar: LarkBuilder, functions: Sequence[ToolFunction], *, parallel: bool
    ) -> Rule:
        """The grammar of one call, or of several if `parallel`, of any of `functions`.

        It starts after `opening`.
        """
        bodies = [self.body(grammar, function) for function in functions]
        call = grammar.sequence(*self.before_call, grammar.choice(bodies), *self.after_call)
        calls = grammar.repeated(call, between=self.between, parallel=parallel)
        return grammar.sequence(*self.before_calls, calls, *self.after_calls)

    @abstractmethod
    def body(self, grammar: LarkBuilder, function: ToolFunction) -> Rule:
        """The grammar of the name and the arguments of a call."""

    def new_id(self) -> str:
        """An id for a call whose format has none."""
        return f"call_{secrets.token_hex(12)}"

    def past_id(self, id: str, name: str, number: int) -> str:
        """`id` as templates accept it; the call is number `number` of the chat, of `name`."""
        return id
