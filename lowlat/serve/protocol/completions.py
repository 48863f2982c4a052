"""Request and response of POST /v1/completions.

Unsupported fields of OpenAI's API (suffix) are rejected by name.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import TypeAliasType

from lowlat.engine import params
from lowlat.generate.params import SamplingParams
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.sampling import MaxTokens, SamplingRequest, TopLogprobs
from lowlat.serve.protocol.structured_outputs import StructuredOutputs
from lowlat.serve.protocol.usage import Timings, Usage

DEFAULT_MAX_TOKENS = 16
"""Default of OpenAI's API."""

TokenId = TypeAliasType("TokenId", Annotated[int, Field(ge=0, le=(1 << 31) - 1)])
"""A named schema, whose maximum the OpenAPI document sets to the vocabulary size."""
TokenIds = Annotated[
    list[TokenId], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPT_TOKENS)
]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPTS)]
IdLists = Annotated[
    list[TokenIds], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPTS)
]
Prompt = str | Texts | TokenIds | IdLists


class CompletionRequest(SamplingRequest):
    """Prompts to complete, as text or token ids."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"suffix"})

    prompt: Prompt
    max_tokens: MaxTokens | None = None
    """Maximum number of generated tokens; default 16, or less at the end of the context."""
    logprobs: TopLogprobs | None = None
    """Return each token's log-probability and those of this many of the most likely tokens."""
    echo: bool | None = None
    """Whether the returned text starts with the prompt; not with logprobs."""
    best_of: Annotated[int, Field(ge=1, le=params.MAX_N)] | None = None
    """Accepted only if equal to n."""
    structured_outputs: StructuredOutputs | None = None
    """Constraint on the output."""

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        self.check_stream()
        if self.structured_outputs is not None:
            self.check_end()
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo with logprobs is not supported; leave one out",
                param="echo",
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of must equal n; leave it out", param="best_of")
        if len(self.prompts) * (self.n or 1) > limits.MAX_PROMPTS:
            raise RequestError(
                f"prompts times n exceed {limits.MAX_PROMPTS} completions; send fewer",
                param="n",
            )
        if self.logprobs is not None:
            completions = len(self.prompts) * (self.n or 1)
            self.check_logprobs(self.logprobs, completions=completions, param="logprobs")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        match self.prompt:
            case str():
                return [self.prompt]
            case [int(), *_]:
                return [[token for token in self.prompt if isinstance(token, int)]]
            case _:
                return [item for item in self.prompt if isinstance(item, str | list)]

    def to_params(self, remaining: int) -> SamplingParams:
        """The engine's sampling params for a prompt with `remaining` context tokens after it."""
        default = max(1, min(DEFAULT_MAX_TOKENS, remaining))
        return self.sampling_params(max_tokens=self.max_tokens or default, logprobs=self.logprobs)


class LegacyLogprobs(WireModel):
    """One entry per token in every list."""

    tokens: list[str]
    """Text of each token; `bytes:\\xNN...` for an incomplete character."""
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Number of characters of the text before each token."""


class CompletionChoice(WireModel):
    index: int
    """Index of the prompt times n, plus index of the completion."""
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    """In a stream null before the completion's last chunk."""


class CompletionResponse(WireModel):
    """The complete response, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    """In a stream only in the last chunk, with include_usage."""
    lowlat: Timings | None = Field(default=None, exclude_if=is_none)
