"""Fields that say how to sample, shared by chat and completions, and their way to SamplingParams.

Owns OpenAI's defaults and where they differ from the engine's. Ranges are `engine.params`'s.
"""

from typing import Annotated

from pydantic import Field

from lowlat.engine import params
from lowlat.engine.params import SamplingParams
from lowlat.serve.protocol import limits
from lowlat.serve.protocol.base import Id, StrictModel
from lowlat.serve.protocol.errors import RequestError

DEFAULT_TEMPERATURE = 1.0
LOWEST_TEMPERATURE = 1e-4
"""Lower temperatures are taken as 0."""

StopString = Annotated[str, Field(min_length=1, max_length=params.MAX_STOP_LENGTH)]
Stop = StopString | Annotated[list[StopString], Field(max_length=params.MAX_STOPS)]
TokenBias = Annotated[float, Field(ge=-100.0, le=100.0)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], TokenBias],
    Field(max_length=params.MAX_LOGIT_BIAS),
]
MaxTokens = Annotated[int, Field(ge=1, le=params.MAX_TOKENS)]
TopLogprobs = Annotated[int, Field(ge=0, le=params.MAX_LOGPROBS)]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=limits.MAX_NAME)],
        Annotated[str, Field(max_length=limits.MAX_METADATA_VALUE)],
    ],
    Field(max_length=limits.MAX_METADATA),
]


class StreamOptions(StrictModel):
    include_usage: bool | None = None
    """Whether a last chunk without choices tells the tokens used."""


class SamplingRequest(StrictModel):
    """What chat and completions requests have in common. Null means the default everywhere."""

    model: Id
    """A name that /v1/models lists."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] | None = None
    """Divides the logits; 0 takes the likeliest token. Default 1."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Keep the fewest likeliest tokens of this probability; no effect at temperature 0."""
    top_k: Annotated[int, Field(ge=0, le=params.MAX_TOP_K)] | None = None
    """Keep the k likeliest tokens, 0 all; no effect at temperature 0."""
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """Keep tokens this probable relative to the likeliest; no effect at temperature 0."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100.0)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    logit_bias: LogitBias | None = None
    """Token id, as a string, to what is added to its logit."""
    seed: Annotated[int, Field(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    n: Annotated[int, Field(ge=1, le=params.MAX_N)] | None = None
    """Completions of each prompt; at temperature 0 they are equal."""
    stop: Stop | None = None
    ignore_eos: bool | None = None
    """Go on after the end-of-sequence token; not with a form, which ends the answer."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[str, Field(max_length=limits.MAX_ID)] | None = None
    """An annotation, without effect."""
    priority: Annotated[int, Field(ge=-limits.MAX_PRIORITY, le=limits.MAX_PRIORITY)] | None = None
    """Lower values are served first, each as if it had come a second earlier. Default 0."""
    deadline_seconds: Annotated[float, Field(gt=0.0, le=limits.MAX_DEADLINE_SECONDS)] | None = None
    """Give up after this long with status 408."""

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True

    def check_stream(self) -> None:
        """Raises RequestError for stream options without a stream."""
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options has an effect with stream true only; leave it out",
                param="stream_options",
            )

    def check_end(self) -> None:
        """Raises RequestError where an answer of a form, which ends with it, is to go on."""
        if self.ignore_eos:
            raise RequestError(
                "ignore_eos: an answer that is held to a form ends with it; leave it out",
                param="ignore_eos",
            )

    def check_logprobs(self, top: int, *, completions: int, param: str) -> None:
        """Raises RequestError where an answer with `top` listed tokens a place is too large."""
        if completions * (top + 1) > limits.MAX_LOGPROBS:
            raise RequestError(
                f"{param}: completions times (listed tokens + 1) are more than "
                f"{limits.MAX_LOGPROBS}; ask for less of either",
                param=param,
            )

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's record. Filters that greedy decoding makes void are dropped, as OpenAI's
        API lets clients send them.
        """
        temperature = DEFAULT_TEMPERATURE if self.temperature is None else self.temperature
        is_greedy = temperature < LOWEST_TEMPERATURE
        n = self.n or 1
        top_k, top_p, min_p = self.top_k or 0, self.top_p or 1.0, self.min_p or 0.0
        if is_greedy:
            # The likeliest token alone is left to sample from: equal completions, as asked.
            temperature, top_k = (0.0, 0) if n == 1 else (1.0, 1)
            top_p, min_p = 1.0, 0.0
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            seed=self.seed,
            logprobs=logprobs,
            n=n,
            stop=_stops(self.stop),
            ignore_eos=self.ignore_eos or False,
        )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)
