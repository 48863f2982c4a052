"""Sampling parameters of the text API: token-level options, stop strings and structured output.

`lowlat.SamplingParams` and the keyword arguments of `Model.generate`. The token-level options and
their ranges are `engine.params`'s.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from lowlat.engine.params import TokenSamplingParams
from lowlat.generate.structured import StructuredOutput
from lowlat.utils.errors import UserError

MAX_STOPS = 16
MAX_STOP_LENGTH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams(TokenSamplingParams):
    """Options of one request; the defaults are greedy decoding up to the context.

    Raises UserError naming the option and its range. Options are applied in this order: repetition,
    frequency and presence penalty, logit_bias, temperature, top_k, top_p, min_p.
    """

    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are not part of its text."""
    structured: StructuredOutput | None = None
    """Structured output, of `lowlat.generate.structured`. Needs the package llguidance."""

    def __post_init__(self) -> None:
        TokenSamplingParams.__post_init__(self)
        if not isinstance(self.stop, tuple) or len(self.stop) > MAX_STOPS:
            raise UserError(f"stop must be a tuple of at most {MAX_STOPS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise UserError(f"stop: every string must have 1 to {MAX_STOP_LENGTH} characters")
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise UserError(
                "structured must be a JsonObject, JsonSchema, Regex, Choice or Grammar of "
                f"lowlat.generate.structured, got {self.structured!r}"
            )
        if self.structured is not None and self.ignore_eos:
            raise UserError("structured outputs end; set ignore_eos to False")


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments; `stop` may also be one string."""

    max_tokens: int | None
    temperature: int | float
    top_k: int
    top_p: int | float
    min_p: int | float
    repetition_penalty: int | float
    presence_penalty: int | float
    frequency_penalty: int | float
    logit_bias: Mapping[int, int | float]
    seed: int | None
    logprobs: int | None
    n: int
    stop: str | Sequence[str] | None
    ignore_eos: bool
    structured: StructuredOutput | None


def make_params(options: SamplingOptions) -> SamplingParams:
    """SamplingParams from keyword arguments. Raises UserError for unknown names and bad values."""
    unknown = sorted(set(options) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise UserError(f"option '{unknown[0]}' is unknown; the sampling options are {known}")
    return SamplingParams(**{**options, "stop": _stops(options.get("stop"))})


def _stops(stop: object) -> tuple[Any, ...]:
    """`stop` as the tuple that SamplingParams takes and checks."""
    if stop is None:
        return ()
    if isinstance(stop, Sequence):
        return (stop,) if isinstance(stop, str) else tuple(stop)
    raise UserError(f"stop must be a string or a list of strings, got {stop!r}")
