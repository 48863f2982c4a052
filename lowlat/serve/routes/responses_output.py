"""Output items of the Responses API and the events that build them.

Output turns the parts of the output parser into items; calls get the names that clients know.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field

from lowlat.serve.chat.freeform import FreeformReader
from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.response_items import ItemStatus
from lowlat.serve.routes.reply import new_id
from lowlat.serve.routes.response_tools import CalledTool
from lowlat.serve.tool_parsers.state import (
    ContentPart,
    Part,
    ReasoningPart,
    ToolCallArguments,
    ToolCallStart,
)


class OutputTextPart(WireModel):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[str] = Field(default_factory=list)
    logprobs: list[str] = Field(default_factory=list)


class ReasoningTextPart(WireModel):
    type: Literal["reasoning_text"] = "reasoning_text"
    text: str


class MessageItem(WireModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: ItemStatus = "in_progress"
    content: list[OutputTextPart] = Field(default_factory=list)


class ReasoningItem(WireModel):
    id: str
    type: Literal["reasoning"] = "reasoning"
    summary: list[str] = Field(default_factory=list)
    status: ItemStatus = "in_progress"
    content: list[ReasoningTextPart] = Field(default_factory=list)


class FunctionCallItem(WireModel):
    id: str
    type: Literal["function_call"] = "function_call"
    status: ItemStatus = "in_progress"
    call_id: str
    namespace: str | None = Field(default=None, exclude_if=is_none)
    name: str
    arguments: str = ""


class CustomToolCallItem(WireModel):
    id: str
    type: Literal["custom_tool_call"] = "custom_tool_call"
    status: ItemStatus = "in_progress"
    call_id: str
    namespace: str | None = Field(default=None, exclude_if=is_none)
    name: str
    input: str = ""


OutputItem = MessageItem | ReasoningItem | FunctionCallItem | CustomToolCallItem


Event = tuple[str, dict[str, Any]]
"""Type and fields."""


class Output:
    """The output items so far; the last one may still grow."""

    def __init__(self, called: Mapping[str, CalledTool]) -> None:
        """`called`: the request's tools by the names that the model sees."""
        self.items: list[OutputItem] = []
        self._called = called
        self._is_open = False
        self._reader = FreeformReader()
        """Of the last call, if it is one of a custom tool."""

    def push(self, part: Part) -> Iterator[Event]:
        """Add `part`; yields its events."""
        match part:
            case ContentPart():
                if not (self._is_open and isinstance(self.items[-1], MessageItem)):
                    text = OutputTextPart(text="")
                    yield from self._open(MessageItem(id=new_id("msg_"), content=[text]))
                yield self._grow(part.text)
            case ReasoningPart():
                if not (self._is_open and isinstance(self.items[-1], ReasoningItem)):
                    text = ReasoningTextPart(text="")
                    yield from self._open(ReasoningItem(id=new_id("rs_"), content=[text]))
                yield self._grow(part.text)
            case ToolCallStart():
                yield from self._open(self._call(part))
            case ToolCallArguments():
                yield from self._extend_call(part.text)

    def close(self, status: ItemStatus = "completed") -> Iterator[Event]:
        """Finish the last item if it is open; yields its events."""
        if not self._is_open:
            return
        self._is_open = False
        item = self.items[-1]
        item.status = status
        if isinstance(item, FunctionCallItem):
            fields = {"name": item.name, "arguments": item.arguments}
            yield self._event("response.function_call_arguments.done", **fields)
        elif isinstance(item, CustomToolCallItem):
            yield from self._extend_input(item, self._reader.finish())
            yield self._event("response.custom_tool_call_input.done", input=item.input)
        else:
            part = item.content[0]
            yield self._text_event(part, "done", text=part.text)
            yield self._part_event("done", part)
        yield self._item_event("done", dump(item))

    def _call(self, part: ToolCallStart) -> OutputItem:
        tool = self._called.get(part.name, CalledTool(part.name))
        if tool.is_custom:
            self._reader = FreeformReader()
            return CustomToolCallItem(
                id=new_id("ctc_"), call_id=part.id, namespace=tool.namespace, name=tool.name
            )
        return FunctionCallItem(
            id=new_id("fc_"), call_id=part.id, namespace=tool.namespace, name=tool.name
        )

    def _extend_call(self, text: str) -> Iterator[Event]:
        item = self.items[-1]
        if isinstance(item, CustomToolCallItem):
            yield from self._extend_input(item, self._reader.push(text))
        else:
            assert isinstance(item, FunctionCallItem)
            item.arguments += text
            yield self._event("response.function_call_arguments.delta", delta=text)

    def _extend_input(self, item: CustomToolCallItem, text: str) -> Iterator[Event]:
        if text:
            item.input += text
            yield self._event("response.custom_tool_call_input.delta", delta=text)

    def _open(self, item: OutputItem) -> Iterator[Event]:
        yield from self.close()
        self.items.append(item)
        self._is_open = True
        if isinstance(item, FunctionCallItem | CustomToolCallItem):
            yield self._item_event("added", dump(item))
        else:
            # Its part is added by an event of its own.
            yield self._item_event("added", {**dump(item), "content": []})
            yield self._part_event("added", item.content[0])

    def _grow(self, text: str) -> Event:
        item = self.items[-1]
        assert isinstance(item, MessageItem | ReasoningItem)
        part = item.content[0]
        part.text += text
        return self._text_event(part, "delta", delta=text)

    def _text_event(
        self, part: OutputTextPart | ReasoningTextPart, kind: str, **fields: object
    ) -> Event:
        more = {"logprobs": []} if isinstance(part, OutputTextPart) else {}
        return self._event(f"response.{part.type}.{kind}", content_index=0, **fields, **more)

    def _part_event(self, kind: str, part: BaseModel) -> Event:
        return self._event(f"response.content_part.{kind}", content_index=0, part=dump(part))

    def _item_event(self, kind: str, item: dict[str, Any]) -> Event:
        fields = {"output_index": len(self.items) - 1, "item": item}
        return f"response.output_item.{kind}", fields

    def _event(self, kind: str, **fields: object) -> Event:
        """An event about the last item."""
        last = len(self.items) - 1
        return kind, {"item_id": self.items[last].id, "output_index": last, **fields}


def dump(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(by_alias=True)
