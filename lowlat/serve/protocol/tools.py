"""Tools in requests: functions, tool calls of earlier messages, tool_choice."""

from typing import Literal

from lowlat.serve.protocol.base import Description, FunctionName, Id, JsonSchemaObject, StrictModel


class Function(StrictModel):
    """A function the model may call."""

    name: FunctionName
    description: Description | None = None
    parameters: JsonSchemaObject | None = None
    """JSON schema of the arguments; None: no arguments."""
    strict: bool | None = None
    """Whether to enforce the schema on the arguments. It is always enforced on forced calls."""


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: str
    """JSON text of the arguments."""


class ToolCall(StrictModel):
    """A call in an earlier message."""

    id: Id
    type: Literal["function"]
    function: CalledFunction


class NamedFunction(StrictModel):
    name: FunctionName


class NamedTool(StrictModel):
    """Forces a call of this function."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
