"""Input items and tools of the Responses API: messages, calls, results, reasoning; text only."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from lowlat.generate import structured
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import (
    Description,
    FunctionName,
    Id,
    JsonSchemaObject,
    StrictModel,
)
from lowlat.serve.protocol.hints import Hint, Ignored
from lowlat.serve.protocol.messages import CacheControl
from lowlat.serve.protocol.sampling import HintText
from lowlat.serve.protocol.validation import UNKNOWN_KIND

Nothing = Annotated[list[str], Field(max_length=0)]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(StrictModel):
    type: Literal["input_text"]
    text: str
    cache_control: CacheControl = None


class OutputText(StrictModel):
    """A text part of an earlier output."""

    type: Literal["output_text"]
    text: str
    annotations: Nothing | None = None
    logprobs: Nothing | None = None
    cache_control: CacheControl = None


TextItem = Annotated[InputText | OutputText, Field(discriminator="type")]
Texts = str | Annotated[list[TextItem], Field(min_length=1, max_length=limits.MAX_CONTENT_PARTS)]


class InputMessage(StrictModel):
    """A message of the conversation."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Texts
    id: Id | None = None
    status: ItemStatus | None = None
    phase: Hint[HintText | None] = None


class FunctionCall(StrictModel):
    """A function call of an earlier output."""

    type: Literal["function_call"]
    call_id: Id
    namespace: FunctionName | None = None
    name: FunctionName
    arguments: str
    id: Id | None = None
    status: ItemStatus | None = None


class FunctionCallOutput(StrictModel):
    """The result of a function call."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Texts
    id: Id | None = None
    status: ItemStatus | None = None


class CustomToolCall(StrictModel):
    """A call of a custom tool in an earlier output."""

    type: Literal["custom_tool_call"]
    call_id: Id
    namespace: FunctionName | None = None
    name: FunctionName
    input: str
    id: Id | None = None
    status: ItemStatus | None = None


class CustomToolCallOutput(StrictModel):
    """The result of a call of a custom tool."""

    type: Literal["custom_tool_call_output"]
    call_id: Id
    name: FunctionName | None = None
    output: Texts
    id: Id | None = None
    status: ItemStatus | None = None


class ReasoningText(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class SummaryText(StrictModel):
    type: Literal["summary_text"]
    text: str


class Reasoning(StrictModel):
    """The reasoning before the output that follows."""

    type: Literal["reasoning"]
    id: Id | None = None
    summary: Annotated[list[SummaryText], Field(max_length=limits.MAX_CONTENT_PARTS)] | None = None
    """The reasoning if there is no content."""
    content: Annotated[list[ReasoningText], Field(max_length=limits.MAX_CONTENT_PARTS)] | None = (
        None
    )
    encrypted_content: None = None
    status: ItemStatus | None = None


def _kind_of(item: object) -> str | None:
    """The type of an input item; messages may omit it."""
    if not isinstance(item, dict):
        return None
    kind = item.get("type", "message")
    return "message" if kind is None else kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[CustomToolCall, Tag("custom_tool_call")]
    | Annotated[CustomToolCallOutput, Tag("custom_tool_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(
        _kind_of,
        custom_error_type=UNKNOWN_KIND,
        custom_error_message=(
            "must be message, function_call, function_call_output, custom_tool_call,"
            " custom_tool_call_output or reasoning"
        ),
    ),
]


class FlatFunction(StrictModel):
    """A function the model may call."""

    type: Literal["function"]
    name: FunctionName
    description: Description | None = None
    parameters: JsonSchemaObject | None = None
    strict: bool | None = None
    output_schema: Hint[JsonSchemaObject | None] = None
    defer_loading: Hint[bool | None] = None


class FreeText(StrictModel):
    type: Literal["text"]


class TextGrammar(StrictModel):
    """A grammar that the input of a custom tool matches."""

    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: Annotated[str, Field(min_length=1, max_length=structured.MAX_GRAMMAR_BYTES)]

    def to_output(self) -> structured.Regex | structured.Grammar:
        """The constraint. Raises UserError above a limit."""
        if self.syntax == "regex":
            return structured.Regex(pattern=self.definition)
        return structured.Grammar(lark=self.definition)


class CustomTool(StrictModel):
    """A tool whose input is text, not JSON (freeform tool)."""

    type: Literal["custom"]
    name: FunctionName
    description: Description | None = None
    format: Annotated[FreeText | TextGrammar, Field(discriminator="type")] | None = None
    defer_loading: Hint[bool | None] = None


class NamespaceTool(StrictModel):
    """Tools under a common name; the model sees NAMESPACE__NAME."""

    type: Literal["namespace"]
    name: FunctionName
    description: Description | None = None
    tools: Annotated[
        list[Annotated[FlatFunction | CustomTool, Field(discriminator="type")]],
        Field(min_length=1, max_length=limits.MAX_TOOLS),
    ]


class WebSearchTool(StrictModel):
    """A tool of OpenAI's servers; the model does not see it."""

    type: Annotated[
        Literal[
            "web_search",
            "web_search_2025_08_26",
            "web_search_preview",
            "web_search_preview_2025_03_11",
        ],
        Ignored(label="web_search"),
    ]
    external_web_access: bool | None = None
    filters: dict[str, object] | None = None
    search_content_types: Annotated[list[HintText], Field(max_length=limits.MAX_TOOLS)] | None = (
        None
    )
    search_context_size: HintText | None = None
    user_location: dict[str, object] | None = None


ResponseTool = Annotated[
    FlatFunction | CustomTool | NamespaceTool | WebSearchTool, Field(discriminator="type")
]


class FlatNamedTool(StrictModel):
    """Forces a call of this tool."""

    type: Literal["function", "custom"]
    name: FunctionName


def text_of_items(content: Texts) -> str:
    """The text of a message or a result."""
    return content if isinstance(content, str) else "".join(part.text for part in content)
