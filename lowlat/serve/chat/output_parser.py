"""AnswerParser: the text of one completion, as it arrives, into reasoning, content and tool calls.

Owns the reasoning before an answer. How calls are written is in tools/; which marks a model uses is
dialect.py's.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from lowlat.serve.tool_parsers.base import ToolFormat
from lowlat.serve.tool_parsers.parts import Part
from lowlat.serve.tool_parsers.reader import Steps
from lowlat.serve.tool_parsers.state import Calls, Schemas

Thinking = Literal["never", "maybe", "begun"]
"""Whether an answer may begin with reasoning, or begins inside it."""


@dataclass(frozen=True, slots=True)
class ReasoningMarks:
    """What stands before and after a model's reasoning."""

    open: str
    close: str


class AnswerParser:
    """Cuts an answer into parts; holds back no more than may still become a mark.

    The parts do not depend on how the text was cut into pieces, but for how long each is: joined,
    they are the same. What looks like a call and is none comes out as content, as it was written.
    """

    def __init__(
        self,
        *,
        marks: ReasoningMarks | None = None,
        thinking: Thinking = "never",
        tools: ToolFormat | None = None,
        schemas: Schemas | None = None,
        calls: Calls | None = None,
    ) -> None:
        """`tools` None: no call is looked for. `schemas` are those of the request's functions."""
        new_id = tools.new_id if tools is not None else str
        self._calls = calls or Calls(schemas or {}, new_id)
        self._marks = marks if thinking != "never" else None
        is_begun = marks is not None and thinking == "begun"
        self._reasoning: Literal["none", "begun", "over"] = "begun" if is_begun else "none"
        self._tools = tools
        self._steps: Generator[None, None, None] | None = self._read()
        self._advance()

    @property
    def reasoning(self) -> Literal["none", "begun", "over"]:
        """How far the reasoning has been read, its marks included."""
        return self._reasoning

    @property
    def has_tool_calls(self) -> bool:
        """Whether a call has begun."""
        return self._calls.count > 0

    def push(self, text: str) -> list[Part]:
        """The parts that `text` makes certain."""
        self._calls.reader.feed(text)
        return self._advance()

    def finish(self) -> list[Part]:
        """What was held back, once no more text can follow."""
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
        reader = self._calls.reader
        while (yield from reader.has_more()):
            self._calls.content(reader.unread)
            reader.skip(len(reader.unread))

    def _read_reasoning(self, marks: ReasoningMarks) -> Steps[None]:
        """Reasoning, without the marks and the line ends beside them."""
        reader = self._calls.reader
        # A model may write the mark again though the prompt ends with it.
        opening = yield from reader.accept_after_space(marks.open)
        if opening is None and self._reasoning == "none":
            return
        self._reasoning = "begun"
        yield from reader.skip_newlines()
        yield from reader.pass_until(marks.close, self._calls.reasoning, held="\n")
        self._reasoning = "over"
        yield from reader.skip_newlines()
