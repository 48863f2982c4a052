"""CompletionRequest: the body of POST /v1/completions."""

from typing import Annotated

from pydantic import Field, model_validator

from lowlat.engine import params
from lowlat.generate.params import SamplingParams
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import TokenIds
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.sampling import SamplingRequest, TopLogprobs

DEFAULT_MAX_TOKENS = 16
"""Default of OpenAI's API."""

Texts = Annotated[list[str], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
IdLists = Annotated[list[TokenIds], Field(min_length=1, max_length=limits.MAX_PROMPTS)]
Prompt = str | Texts | TokenIds | IdLists


class CompletionRequest(SamplingRequest):
    """Prompts to complete, as text or token ids."""

    prompt: Prompt
    suffix: str | None = None
    """Text after the completion, for models with fill-in-the-middle tokens; prompts must be
    texts."""
    max_tokens: Annotated[int, Field(ge=-1, le=params.MAX_TOKENS)] | None = None
    """Maximum number of generated tokens; default 16, or less at the end of the context. 0 only
    computes the prompt; -1 means the rest of the context."""
    logprobs: TopLogprobs | None = None
    """Return each token's log-probability and those of this many of the most likely tokens."""
    echo: bool | None = None
    """Whether the returned text, and with logprobs its tokens, start with the prompt."""
    best_of: Annotated[int, Field(ge=1, le=params.MAX_N)] | None = None
    """Accepted only if equal to n."""

    @model_validator(mode="after")
    def _check(self) -> "CompletionRequest":
        self.check_stream()
        if self.suffix is not None and not all(isinstance(p, str) for p in self.prompts):
            raise RequestError("suffix requires prompts as text; leave it out", param="suffix")
        self.check_guided()
        if self.guided_fields:
            self.check_end()
        self.check_prompt_logprobs()
        if self.echo and self.stream and self.logprobs is not None:
            message = "echo with logprobs cannot be streamed; leave stream out"
            raise RequestError(message, param="echo")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of must equal n; leave it out", param="best_of")
        completions = len(self.prompts) * (self.n or 1)
        if completions > limits.MAX_PROMPTS:
            message = f"prompts times n exceed {limits.MAX_PROMPTS} completions; send fewer"
            raise RequestError(message, param="n")
        if self.logprobs is not None:
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

    @property
    def generates(self) -> bool:
        """Whether the output has tokens."""
        return self.max_tokens != 0

    @property
    def scored(self) -> tuple[int, str] | None:
        """How many alternatives of each prompt token to compute, and the field that asks for it."""
        echoed = self.logprobs if self.echo else None
        if self.prompt_logprobs is None:
            return None if echoed is None else (echoed, "logprobs")
        return max(echoed or 0, self.prompt_logprobs), "prompt_logprobs"

    def to_params(self, remaining: int, *, reduces_max_tokens: bool = False) -> SamplingParams:
        """The engine's sampling params for a prompt with `remaining` context tokens after it."""
        if self.max_tokens == -1:
            limit = None
        else:
            limit = self.max_tokens or (DEFAULT_MAX_TOKENS if self.generates else 1)
            if reduces_max_tokens or self.max_tokens is None:
                limit = max(1, min(limit, remaining))
        return self.sampling_params(max_tokens=limit, logprobs=self.logprobs)
