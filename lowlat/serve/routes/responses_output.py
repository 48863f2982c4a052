"""Output items of /v1/responses and their stream events, built from the parts of an output.

`routes.responses` builds the response object around them.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from lowlat.serve.protocol import responses_output as wire
from lowlat.serve.routes.response_fields import new_id
from lowlat.serve.tool_parsers.parts import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)

Event = tuple[str, dict[str, Any]]
"""Type and fields."""


class Output:
    """The output items so far; the last one may still grow."""

    def __init__(self) -> None:
        self.items: list[wire.OutputItem] = []
        self._is_open = False

    def push(self, part: Part) -> Iterator[Event]:
        """Add `part`; yields its events."""
        match part:
            case ContentPart():
                yield from self._push_message(part.text)
            case ReasoningPart():
                yield from self._push_reasoning(part.text)
            case ToolCallStart():
                yield from self.close()
                item = wire.FunctionCallItem(id=new_id("fc_"), call_id=part.id, name=part.name)
                yield from self._open(item)
            case ToolCallArguments():
                item = self.items[-1]
                if isinstance(item, wire.FunctionCallItem):
                    item.arguments += part.text
                    yield self._event("response.function_call_arguments.delta", delta=part.text)

    def close(self, status: wire.ItemStatus = "completed") -> Iterator[Event]:
        """Finish the last item if it is open; yields its events."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item.status = status
        match item:
            case wire.MessageItem():
                text = item.content[0].text
                yield self._event("response.output_text.done", True, text=text, logprobs=[])
                yield self._event("response.content_part.done", True, part=_dump(item.content[0]))
            case wire.ReasoningItem():
                yield self._event("response.reasoning_text.done", True, text=item.content[0].text)
                yield self._event("response.content_part.done", True, part=_dump(item.content[0]))
            case wire.FunctionCallItem():
                yield self._event(
                    "response.function_call_arguments.done",
                    name=item.name,
                    arguments=item.arguments,
                )
        fields = {"output_index": len(self.items) - 1, "item": _dump(item)}
        yield "response.output_item.done", fields

    def _push_message(self, text: str) -> Iterator[Event]:
        item = self.items[-1] if self._is_open else None
        if not isinstance(item, wire.MessageItem):
            yield from self.close()
            item = wire.MessageItem(id=new_id("msg_"))
            yield from self._open(item)
            item.content.append(wire.OutputTextPart(text=""))
            yield self._event("response.content_part.added", True, part=_dump(item.content[0]))
        item.content[0].text += text
        yield self._event("response.output_text.delta", True, delta=text, logprobs=[])

    def _push_reasoning(self, text: str) -> Iterator[Event]:
        item = self.items[-1] if self._is_open else None
        if not isinstance(item, wire.ReasoningItem):
            yield from self.close()
            item = wire.ReasoningItem(id=new_id("rs_"))
            yield from self._open(item)
            item.content.append(wire.ReasoningTextPart(text=""))
            yield self._event("response.content_part.added", True, part=_dump(item.content[0]))
        item.content[0].text += text
        yield self._event("response.reasoning_text.delta", True, delta=text)

    def _open(self, item: wire.OutputItem) -> Iterator[Event]:
        self.items.append(item)
        self._is_open = True
        fields = {"output_index": len(self.items) - 1, "item": _dump(item)}
        yield "response.output_item.added", fields

    def _event(self, kind: str, has_parts: bool = False, **fields: object) -> Event:
        """An event about the last item; with `has_parts`, about its first part."""
        place: dict[str, object] = {"content_index": 0} if has_parts else {}
        last = len(self.items) - 1
        return kind, {"item_id": self.items[last].id, "output_index": last, **place, **fields}


def _dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True)
