"""ChatRequest: the body of POST /v1/chat/completions.

Unsupported fields of OpenAI's API are rejected by name, never ignored. Some are accepted with their
default value only, because clients send it.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from lowlat.generate.params import SamplingParams
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import Name, OnlyFalse
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.messages import Message, NamedTool, Tool, ToolChoice
from lowlat.serve.protocol.sampling import MaxTokens, Metadata, SamplingRequest, TopLogprobs
from lowlat.serve.protocol.structured_outputs import ResponseFormat, StructuredOutputs, TextFormat

TemplateVariable = bool | int | Annotated[str, Field(max_length=limits.MAX_ID)]


class ChatRequest(SamplingRequest):
    """A chat to complete."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset(
        "audio function_call functions prediction prompt_cache_key prompt_cache_retention"
        " reasoning_effort verbosity web_search_options".split()
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
    tools: Annotated[list[Tool], Field(min_length=1, max_length=limits.MAX_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    """Default auto with tools, none without."""
    parallel_tool_calls: bool | None = None
    """Whether the model may call several functions at once. Default true."""
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    """Constraints that response_format does not offer, as in vLLM."""
    chat_template_kwargs: (
        Annotated[dict[Name, TemplateVariable], Field(max_length=limits.MAX_TEMPLATE_VARIABLES)]
        | None
    ) = None
    """Variables for the model's chat template, such as enable_thinking."""
    metadata: Metadata | None = None
    """An annotation without effect."""
    safety_identifier: Annotated[str, Field(max_length=limits.MAX_ID)] | None = None
    """An annotation without effect."""
    store: OnlyFalse | None = None
    """Nothing is stored."""
    service_tier: Literal["auto", "default"] | None = None
    """There is one tier."""
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    """Text only."""

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        self.check_stream()
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
            if self.tool_choice not in (None, "none"):
                raise RequestError("tool_choice requires tools; set them", param="tool_choice")
            if self.parallel_tool_calls is not None:
                raise RequestError(
                    "parallel_tool_calls requires tools; leave it out", param="parallel_tool_calls"
                )
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
