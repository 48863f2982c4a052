"""Functions a model may call, its calls, and which of them a request asks for."""

from typing import Literal

from lowlat.serve.protocol.base import Description, FunctionName, Id, JsonSchemaObject, StrictModel


class Function(StrictModel):
    """A function the model may call."""

    name: FunctionName
    description: Description | None = None
    parameters: JsonSchemaObject | None = None
    """JSON schema of the arguments; none: no arguments."""
    strict: bool | None = None
    """Whether arguments must match the schema. Forced calls match it in any case."""


class Tool(StrictModel):
    type: Literal["function"]
    function: Function


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: str
    """JSON text of the arguments, as the model wrote it."""


class ToolCall(StrictModel):
    """A call in an earlier answer."""

    id: Id
    type: Literal["function"]
    function: CalledFunction


class NamedFunction(StrictModel):
    name: FunctionName


class NamedTool(StrictModel):
    """Asks for a call of this function."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
