"""A request's messages as chat templates expect them.

Owns the checks that templates leave out: that a tool's result answers a call, that past arguments
are JSON, that names are shown. Roles and their order are the templates' business.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowlat.serve.chat.template_features import Dialect
from lowlat.serve.http.body import parse_object
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.messages import (
    AssistantMessage,
    Message,
    SystemMessage,
    ToolMessage,
    UserMessage,
    text_of,
)
from lowlat.serve.protocol.tools import ToolCall
from lowlat.serve.tool_parsers.base import ToolFormat


def template_messages(dialect: Dialect, messages: Sequence[Message]) -> list[dict[str, Any]]:
    """`messages` for the template of `dialect`. Raises RequestError naming the message at fault."""
    history = _History(dialect)
    return [history.convert(message, f"messages[{i}]") for i, message in enumerate(messages)]


@dataclass(slots=True)
class _Call:
    """A call made earlier in the conversation."""

    id: str
    name: str


@dataclass(slots=True)
class _History:
    """The conversation as far as it is converted."""

    dialect: Dialect
    calls: dict[str, _Call] = field(default_factory=dict)
    num_calls: int = 0

    def convert(self, message: Message, place: str) -> dict[str, Any]:
        match message:
            case SystemMessage():
                return self._system(message, place)
            case UserMessage():
                turn = {"role": "user", "content": text_of(message.content)}
                return self._named(turn, message.name, place)
            case AssistantMessage():
                return self._answer(message, place)
            case ToolMessage():
                return self._result(message, place)

    def _system(self, message: SystemMessage, place: str) -> dict[str, Any]:
        if not self.dialect.supports_system:
            raise RequestError(
                f"{place}.role: this model's chat template has no system messages; put the text"
                " into the first user message",
                param=f"{place}.role",
            )
        role = message.role if self.dialect.has_developer_role else "system"
        turn = {"role": role, "content": text_of(message.content)}
        return self._named(turn, message.name, place)

    def _answer(self, message: AssistantMessage, place: str) -> dict[str, Any]:
        content: str | None = text_of(message.content)
        turn: dict[str, Any] = {"role": "assistant"}
        if message.reasoning_content is not None:
            turn["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            format = self._format(f"{place}.tool_calls")
            turn["tool_calls"] = [
                self._call(format, call, f"{place}.tool_calls[{i}]")
                for i, call in enumerate(message.tool_calls)
            ]
            if not content and not format.needs_content:
                content = None
        turn["content"] = content
        return self._named(turn, message.name, place)

    def _named(self, turn: dict[str, Any], name: str | None, place: str) -> dict[str, Any]:
        if name is None:
            return turn
        if turn["role"] not in self.dialect.named_roles:
            raise RequestError(
                f"{place}.name: this model's chat template does not show names; leave it out, or"
                " put it into the text",
                param=f"{place}.name",
            )
        return {**turn, "name": name}

    def _format(self, place: str) -> ToolFormat:
        """How calls are written. Raises RequestError where there is no way."""
        format = self.dialect.tools
        if format is None:
            raise RequestError(
                f"{place}: this model's chat template has no known way to call functions; leave"
                " calls and their results out",
                param=place,
            )
        return format

    def _call(self, format: ToolFormat, call: ToolCall, place: str) -> dict[str, Any]:
        name = call.function.name
        shown = _Call(format.past_id(call.id, name, self.num_calls), name)
        self.num_calls += 1
        self.calls[call.id] = shown
        arguments: Any = call.function.arguments
        decoded = _decoded(arguments, f"{place}.function.arguments")
        if not self.dialect.takes_text_arguments:
            arguments = decoded
        function = {"name": name, "arguments": arguments}
        return {"id": shown.id, "type": "function", "function": function}

    def _result(self, message: ToolMessage, place: str) -> dict[str, Any]:
        self._format(f"{place}.role")
        call = self.calls.get(message.tool_call_id)
        if call is None:
            raise RequestError(
                f"{place}.tool_call_id: no assistant message before it holds a call with this id",
                param=f"{place}.tool_call_id",
            )
        if message.name not in (None, call.name):
            raise RequestError(
                f"{place}.name is not that of the function called; leave it out",
                param=f"{place}.name",
            )
        result = {"role": "tool", "content": text_of(message.content), "tool_call_id": call.id}
        return {**result, "name": call.name}


def _decoded(arguments: str, place: str) -> dict[str, Any]:
    """The arguments of a past call, held to what bodies are. Raises RequestError where they are no
    JSON object; numbers stay as the model wrote them.
    """
    if not arguments.strip():
        return {}
    text = arguments.encode("utf-8", "surrogatepass")
    return parse_object(text, what=place, param=place, keeps_floats=True)
