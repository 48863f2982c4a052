"""ChatRequest: the body of POST /v1/chat/completions.

Unsupported fields of OpenAI's API are rejected by name if they change the answer; hints are
accepted (`protocol.hints`).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lowlat.generate.params import SamplingParams
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import Name, check_entries
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.hints import Hint, Ignored, TemplateHint
from lowlat.serve.protocol.messages import Message, NamedTool, Tool, ToolChoice
from lowlat.serve.protocol.sampling import (
    HintText,
    MaxTokens,
    Metadata,
    ReasoningEffort,
    SamplingRequest,
    TopLogprobs,
)
from lowlat.serve.protocol.structured_outputs import ResponseFormat, StructuredOutputs, TextFormat

TemplateVariable = bool | int | Annotated[str, Field(max_length=limits.MAX_ID)]


class ChatRequest(SamplingRequest):
    """A chat to complete."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset(
        {"audio", "function_call", "functions", "web_search_options"}
    )

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: MaxTokens | None = None
    """Maximum number of generated tokens, reasoning included; default: the rest of the context."""
    max_tokens: MaxTokens | None = None
    """Deprecated name of max_completion_tokens."""
    logprobs: bool | None = None
    """Whether to return each token's log-probability."""
    top_logprobs: TopLogprobs | None = None
    """How many of the most likely tokens to return per position; requires logprobs."""
    tools: Annotated[
        Annotated[list[Tool], Field(max_length=limits.MAX_TOOLS)] | None,
        Ignored(when=lambda chat: not chat.tools),
    ] = None
    tool_choice: Annotated[ToolChoice | None, Ignored(when=lambda chat: not chat.tools)] = None
    """Default auto with tools, none without."""
    parallel_tool_calls: Annotated[bool | None, Ignored(when=lambda chat: not chat.tools)] = None
    """Whether the model may call several functions at once. Default true."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """Constraints that response_format does not offer, as in vLLM."""
    chat_template_kwargs: (
        Annotated[
            dict[Name, TemplateVariable],
            Field(max_length=limits.MAX_TEMPLATE_VARIABLES),
            check_entries(limits.MAX_TEMPLATE_VARIABLES),
        ]
        | None
    ) = None
    """Variables for the model's chat template, such as enable_thinking."""
    reasoning_effort: TemplateHint[ReasoningEffort | None] = None
    """Turns reasoning on or off if the chat template can; none and minimal turn it off."""
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    """Text only."""
    metadata: Hint[Metadata | None] = None
    safety_identifier: Hint[HintText | None] = None
    store: Annotated[bool | None, Ignored(when=lambda chat: chat.store)] = None
    """Chats are not stored."""
    service_tier: Hint[HintText | None] = None
    verbosity: Hint[HintText | None] = None
    prediction: Hint[dict[str, object] | None] = None
    prompt_cache_key: Hint[HintText | None] = None
    prompt_cache_retention: Hint[HintText | None] = None
    client_metadata: Hint[dict[str, object] | None] = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        self.check_stream()
        self.check_prompt_logprobs()
        self._check_lengths()
        self._check_constraints()
        self._check_tools()
        return self

    def _check_lengths(self) -> None:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise RequestError(
                "max_tokens and max_completion_tokens differ; set one", param="max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs requires logprobs true; set it or leave top_logprobs out",
                param="top_logprobs",
            )
        if self.logprobs:
            top = self.top_logprobs or 0
            self.check_logprobs(top, completions=self.n or 1, param="top_logprobs")

    def _check_constraints(self) -> None:
        if self._has_format and self.structured_outputs is not None:
            raise RequestError(
                "response_format and structured_outputs exclude each other; set one",
                param="structured_outputs",
            )

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise RequestError("tools: two functions have the same name; rename one", param="tools")
        if not names:
            if self.tool_choice not in (None, "none", "auto"):
                raise RequestError("tool_choice requires tools; set them", param="tool_choice")
        elif isinstance(self.tool_choice, NamedTool):
            if self.tool_choice.function.name not in names:
                raise RequestError(
                    f"tool_choice: tools has no function '{self.tool_choice.function.name}'",
                    param="tool_choice",
                )

    @property
    def _has_format(self) -> bool:
        return not isinstance(self.response_format, TextFormat | None)

    @property
    def constraint_field(self) -> str:
        """The field that constrains the output, if one does."""
        if self.structured_outputs is not None:
            return "structured_outputs"
        return "response_format" if self._has_format else "tools"

    @property
    def completion_limit(self) -> int | None:
        """Maximum number of generated tokens; None: the rest of the context."""
        return self.max_tokens or self.max_completion_tokens

    def to_params(self) -> SamplingParams:
        return self.sampling_params(
            max_tokens=self.completion_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
