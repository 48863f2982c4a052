"""Tools of the Responses API as functions of a chat, and the way back from their calls.

Functions of a namespace get the namespace as a prefix; custom tools become functions with one text
argument (`chat.freeform`). Web search is not presented to the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lowlat.generate import structured
from lowlat.serve.chat.freeform import PARAMETERS
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.errors import RequestError, about
from lowlat.serve.protocol.response_items import (
    CustomTool,
    FlatFunction,
    NamespaceTool,
    ResponseTool,
    TextGrammar,
)


@dataclass(frozen=True, slots=True)
class CalledTool:
    """A tool as clients know it."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class ChatTools:
    """The tools of a request, by the names that the model sees."""

    functions: list[dict[str, Any]] = field(default_factory=list)
    """The chat's `tools`."""
    called: dict[str, CalledTool] = field(default_factory=dict)
    texts: dict[str, structured.Regex | structured.Grammar] = field(default_factory=dict)
    """Constraints on the inputs of custom tools."""


def chat_tools(tools: Sequence[ResponseTool]) -> ChatTools:
    """Raises RequestError for names or grammars that exceed a limit."""
    made = ChatTools()
    for path, namespace, tool in _each(tools):
        name = flat_name(namespace, tool.name, path)
        function: dict[str, Any] = {"name": name, "description": tool.description}
        if isinstance(tool, FlatFunction):
            function |= {"parameters": tool.parameters, "strict": tool.strict}
        else:
            function["parameters"] = PARAMETERS
            if isinstance(tool.format, TextGrammar):
                with about(f"{path}.format"):
                    made.texts[name] = tool.format.to_output()
        made.functions.append({"type": "function", "function": function})
        made.called[name] = CalledTool(tool.name, namespace, isinstance(tool, CustomTool))
    if len(made.functions) > limits.MAX_TOOLS:
        raise RequestError(
            f"tools: more than {limits.MAX_TOOLS} functions, those of namespaces included",
            param="tools",
        )
    return made


def _each(
    tools: Sequence[ResponseTool],
) -> Iterator[tuple[str, str | None, FlatFunction | CustomTool]]:
    """Path, namespace and tool of all tools that the model sees."""
    for index, tool in enumerate(tools):
        if isinstance(tool, FlatFunction | CustomTool):
            yield f"tools[{index}]", None, tool
        elif isinstance(tool, NamespaceTool):
            for number, inner in enumerate(tool.tools):
                yield f"tools[{index}].tools[{number}]", tool.name, inner


def flat_name(namespace: str | None, name: str, path: str) -> str:
    """The name that the model sees. Raises RequestError about `path` if it is too long."""
    if namespace is None:
        return name
    flat = f"{namespace.removesuffix('__')}__{name}"
    if len(flat) > limits.MAX_FUNCTION_NAME:
        raise RequestError(
            f"{path}: namespace and name have more than {limits.MAX_FUNCTION_NAME - 2} characters"
            " together; shorten one",
            param=path,
        )
    return flat
