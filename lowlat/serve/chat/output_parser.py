"""OutputParser: streaming split of a completion's text into reasoning, content and tool calls.

Parses the reasoning itself (reasoning parser in vLLM); `serve.tool_parsers` parse the calls,
and `chat.template_features` detects the formats that a model uses.
"""

from collections.abc import Generator
from typing import Literal

from lowlat.serve.tool_parsers.base import ToolParser
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import ParserState, Part, Schemas
from lowlat.text.reasoning_tags import ReasoningTags

ReasoningMode = Literal["never", "maybe", "begun"]
"""Whether the output has no reasoning, may begin with it, or begins inside it."""


class OutputParser:
    """Splits an output into parts; holds back only text that may still become a tag.

    The concatenated parts do not depend on the chunks of the text. A malformed call is
    returned as content, unchanged.
    """

    def __init__(
        self,
        *,
        marks: ReasoningTags | None = None,
        thinking: ReasoningMode = "never",
        tools: ToolParser | None = None,
        schemas: Schemas | None = None,
        calls: ParserState | None = None,
    ) -> None:
        """`tools` None: calls are not parsed. `schemas`: those of the request's functions."""
        new_id = tools.new_id if tools is not None else str
        self._calls = calls or ParserState(schemas or {}, new_id)
        self._marks = marks if thinking != "never" else None
        is_begun = marks is not None and thinking == "begun"
        self._reasoning: Literal["none", "begun", "over"] = "begun" if is_begun else "none"
        self._tools = tools
        self._steps: Generator[None, None, None] | None = self._read()
        self._advance()

    @property
    def reasoning(self) -> Literal["none", "begun", "over"]:
        """State of the reasoning, tags included."""
        return self._reasoning

    @property
    def has_tool_calls(self) -> bool:
        return self._calls.count > 0

    def push(self, text: str) -> list[Part]:
        """Parse more text; returns the parts that are now certain."""
        self._calls.reader.feed(text)
        return self._advance()

    def finish(self) -> list[Part]:
        """Return what was held back: no more text follows."""
        self._calls.reader.end()
        return self._advance()

    def _advance(self) -> list[Part]:
        if self._steps is not None and next(self._steps, True):
            self._steps = None
        parts, self._calls.parts = self._calls.parts, []
        return parts

    def _read(self) -> Steps[None]:
        if self._marks is not None:
            yield from self._read_reasoning(self._marks)
        if self._tools is not None:
            yield from self._tools.read(self._calls)
        yield from self._calls.reader.pass_rest(self._calls.content)

    def _read_reasoning(self, marks: ReasoningTags) -> Steps[None]:
        """Parse the reasoning, without its tags and the line breaks around them."""
        reader = self._calls.reader
        # A model may repeat the opening tag although the prompt ends with it.
        opening = yield from reader.accept_after_space(marks.open)
        if opening is None and self._reasoning == "none":
            return
        self._reasoning = "begun"
        yield from reader.skip_newlines()
        yield from reader.pass_until(marks.close, self._calls.reasoning, held="\n")
        self._reasoning = "over"
        yield from reader.skip_newlines()
