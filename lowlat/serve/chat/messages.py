"""Message history: a request's messages in the format that chat templates expect.

Checks what templates do not: that a tool result belongs to a call, that arguments of past calls are
JSON, that the template renders names. Roles and their order are checked by the templates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowlat.serve.chat.template_features import TemplateFeatures
from lowlat.serve.http.body import parse_object
from lowlat.serve.http.json_values import MIN_BYTES_PER_VALUE, count_values
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolCall,
    ToolMessage,
    UserMessage,
    text_of,
)
from lowlat.serve.tool_parsers.base import ToolParser


def template_messages(
    features: TemplateFeatures, messages: Sequence[Message]
) -> list[dict[str, Any]]:
    """`messages` for the template with `features`. Raises RequestError naming the message."""
    _check_arguments(messages)
    history = _History(features)
    return [history.convert(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_arguments(messages: Sequence[Message]) -> None:
    """Bound the values in the arguments of all past calls together, before they are parsed."""
    texts = [
        call.function.arguments
        for message in messages
        if isinstance(message, AssistantMessage)
        for call in message.tool_calls or ()
    ]
    most = limits.MAX_JSON_VALUES
    if sum(map(len, texts)) > most * MIN_BYTES_PER_VALUE:
        # Counted one by one: an open quote of one text must not hide the next.
        if sum(count_values(text.encode("utf-8", "surrogatepass")) for text in texts) > most:
            raise RequestError(
                f"messages: the arguments of tool calls hold more than {most} JSON values; "
                "shorten the conversation",
                param="messages",
            )


@dataclass(slots=True)
class _Call:
    id: str
    name: str


@dataclass(slots=True)
class _History:
    """The conversation so far, while it is converted."""

    features: TemplateFeatures
    calls: dict[str, _Call] = field(default_factory=dict)
    num_calls: int = 0

    def convert(self, message: Message, path: str) -> dict[str, Any]:
        match message:
            case SystemMessage():
                return self._system(message, path)
            case UserMessage():
                turn = {"role": "user", "content": text_of(message.content)}
                return self._named(turn, message.name, path)
            case AssistantMessage():
                return self._answer(message, path)
            case ToolMessage():
                return self._result(message, path)

    def _system(self, message: SystemMessage, path: str) -> dict[str, Any]:
        if not self.features.supports_system:
            raise RequestError(
                f"{path}.role: this model's chat template does not support system messages; put the"
                " text into the first user message",
                param=f"{path}.role",
            )
        role = message.role if self.features.has_developer_role else "system"
        turn = {"role": role, "content": text_of(message.content)}
        return self._named(turn, message.name, path)

    def _answer(self, message: AssistantMessage, path: str) -> dict[str, Any]:
        content: str | None = text_of(message.content)
        turn: dict[str, Any] = {"role": "assistant"}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            format = self._format(f"{path}.tool_calls")
            turn["tool_calls"] = [
                self._call(format, call, f"{path}.tool_calls[{i}]")
                for i, call in enumerate(message.tool_calls)
            ]
            if not content and not format.needs_content:
                content = None
        turn["content"] = content
        return self._named(turn, message.name, path)

    def _named(self, turn: dict[str, Any], name: str | None, path: str) -> dict[str, Any]:
        if name is None:
            return turn
        if turn["role"] not in self.features.named_roles:
            raise RequestError(
                f"{path}.name: this model's chat template does not support names; leave it out, or"
                " put it into the text",
                param=f"{path}.name",
            )
        return {**turn, "name": name}

    def _format(self, path: str) -> ToolParser:
        """The model's tool-call format. Raises RequestError if it has none."""
        format = self.features.tools
        if format is None:
            raise RequestError(
                f"{path}: this model's chat template has no known tool-call format; leave calls"
                " and their results out",
                param=path,
            )
        return format

    def _call(self, format: ToolParser, call: ToolCall, path: str) -> dict[str, Any]:
        name = call.function.name
        shown = _Call(format.past_id(call.id, name, self.num_calls), name)
        self.num_calls += 1
        self.calls[call.id] = shown
        arguments: Any = call.function.arguments
        decoded = _decoded(arguments, f"{path}.function.arguments")
        if not self.features.takes_json_arguments:
            arguments = decoded
        function = {"name": name, "arguments": arguments}
        return {"id": shown.id, "type": "function", "function": function}

    def _result(self, message: ToolMessage, path: str) -> dict[str, Any]:
        self._format(f"{path}.role")
        call = self.calls.get(message.tool_call_id)
        if call is None:
            raise RequestError(
                f"{path}.tool_call_id: no earlier assistant message has a tool call with this id",
                param=f"{path}.tool_call_id",
            )
        if message.name not in (None, call.name):
            raise RequestError(
                f"{path}.name is not the name of the called function; leave it out",
                param=f"{path}.name",
            )
        result = {"role": "tool", "content": text_of(message.content), "tool_call_id": call.id}
        return {**result, "name": call.name}


def _decoded(arguments: str, path: str) -> dict[str, Any]:
    """The arguments of a past call, parsed as strictly as a body; numbers stay unchanged.

    Raises RequestError unless they are a JSON object.
    """
    if not arguments.strip():
        return {}
    text = arguments.encode("utf-8", "surrogatepass")
    return parse_object(text, what=path, param=path, keeps_floats=True)
