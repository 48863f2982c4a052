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
from lowlat.serve.protocol.hints import Ignored, TemplateHint
from lowlat.serve.protocol.messages import (
    AssistantMessage,
    Message,
    NamedTool,
    Tool,
    ToolChoice,
    text_of,
)
from lowlat.serve.protocol.sampling import (
    ReasoningEffort,
    SamplingRequest,
    TopLogprobs,
    UnlimitedTokens,
)
from lowlat.serve.protocol.structured_outputs import ResponseFormat, TextFormat

TemplateVariable = bool | int | Annotated[str, Field(max_length=limits.MAX_ID)]


class ChatRequest(SamplingRequest):
    """A chat to complete."""

    UNSUPPORTED: ClassVar[frozenset[str]] = SamplingRequest.UNSUPPORTED | {
        "audio",
        "function_call",
        "functions",
        "web_search_options",
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: UnlimitedTokens | None = None
    """Maximum number of generated tokens, reasoning included; default and -1: the rest of the
    context."""
    max_tokens: UnlimitedTokens | None = None
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
    add_generation_prompt: bool | None = None
    """Whether the prompt ends with the beginning of an assistant message. Default true."""
    continue_final_message: bool | None = None
    """Whether the output continues the last message, an assistant's (prefill)."""

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        self.check_stream()
        self.check_prompt_logprobs()
        self._check_lengths()
        self._check_constraints()
        self._check_tools()
        if self.continue_final_message:
            self._check_prefill()
        return self

    def _check_prefill(self) -> None:
        last = self.messages[-1]
        if not isinstance(last, AssistantMessage) or last.tool_calls or not text_of(last.content):
            raise RequestError(
                "continue_final_message requires an assistant message with text at the end",
                param="continue_final_message",
            )
        if self.add_generation_prompt:
            raise RequestError(
                "continue_final_message requires add_generation_prompt false; set it",
                param="add_generation_prompt",
            )

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
        self.check_guided(*(["response_format"] if self._has_format else []))

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
        if self.guided_fields:
            return self.guided_fields[0]
        return "response_format" if self._has_format else "tools"

    @property
    def completion_limit(self) -> int | None:
        """Maximum number of generated tokens; None: the rest of the context."""
        given = self.max_tokens or self.max_completion_tokens
        return None if given == -1 else given

    def to_params(self) -> SamplingParams:
        return self.sampling_params(
            max_tokens=self.completion_limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
