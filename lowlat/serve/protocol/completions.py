"""CompletionRequest, the body of POST /v1/completions, and the answer to it.

Owns the fields and the rules between them. Fields of OpenAI's API that are not here (suffix) are
refused by name.
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import TypeAliasType

from lowlat.engine import params
from lowlat.engine.params import SamplingParams
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import WireModel, is_none
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.sampling import MaxTokens, SamplingRequest, TopLogprobs
from lowlat.serve.protocol.structured_outputs import StructuredOutputs
from lowlat.serve.protocol.usage import Timings, Usage

DEFAULT_MAX_TOKENS = 16
"""What OpenAI's API generates where nothing is said."""

TokenId = TypeAliasType("TokenId", Annotated[int, Field(ge=0, le=(1 << 31) - 1)])
"""With a name of its own in the OpenAPI document, which knows how many there are."""
TokenIds = Annotated[
    list[TokenId], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPT_TOKENS)
]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPTS)]
IdLists = Annotated[
    list[TokenIds], Field(fail_fast=True, min_length=1, max_length=limits.MAX_PROMPTS)
]
Prompt = str | Texts | TokenIds | IdLists


class CompletionRequest(SamplingRequest):
    """Texts, or token ids, to go on with."""

    UNSUPPORTED: ClassVar[frozenset[str]] = frozenset({"suffix"})

    prompt: Prompt
    max_tokens: MaxTokens | None = None
    """Most tokens to generate; default 16, or what the context leaves where that is less."""
    logprobs: TopLogprobs | None = None
    """Return each token's log-probability and those of this many of the likeliest tokens."""
    echo: bool | None = None
    """Whether the text of an answer begins with the prompt; not with logprobs."""
    best_of: Annotated[int, Field(ge=1, le=params.MAX_N)] | None = None
    """Accepted where it equals n: no completions are thrown away."""
    structured_outputs: StructuredOutputs | None = None
    """The form the answer must have."""

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        self.check_stream()
        if self.structured_outputs is not None:
            self.check_end()
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo with logprobs is not supported: a prompt's tokens have none; leave one out",
                param="echo",
            )
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of must equal n; leave it out", param="best_of")
        if len(self.prompts) * (self.n or 1) > limits.MAX_PROMPTS:
            raise RequestError(
                f"prompt: prompts times n are more than {limits.MAX_PROMPTS} completions",
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

    def to_params(self, room: int) -> SamplingParams:
        """The engine's sampling record for a prompt after which the context has `room` tokens."""
        default = max(1, min(DEFAULT_MAX_TOKENS, room))
        return self.sampling_params(max_tokens=self.max_tokens or default, logprobs=self.logprobs)


class LegacyLogprobs(WireModel):
    """One entry per token in every list."""

    tokens: list[str]
    """Text of each token; `bytes:\\xNN...` for one that is only part of a character."""
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]
    """Characters of the answer before each token."""


class CompletionChoice(WireModel):
    index: int
    """Number of the prompt times n plus number of the completion."""
    text: str
    logprobs: LegacyLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    """Null in a stream until the completion's last chunk."""


class CompletionResponse(WireModel):
    """The whole answer, and each chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    """Unix time in seconds."""
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, exclude_if=is_none)
    """In a stream only in the last chunk, where it was asked for."""
    lowlat: Timings | None = Field(default=None, exclude_if=is_none)
