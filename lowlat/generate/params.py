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
MAX_BAD_WORDS = 128
MAX_BAD_WORD_LENGTH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams(TokenSamplingParams):
    """Options of one request; the defaults are greedy decoding up to the context.

    Raises UserError naming the option and its range. Options are applied in this order: repetition,
    frequency and presence penalty, logit_bias, temperature, top_k, top_p, min_p.
    """

    stop: tuple[str, ...] = ()
    """Strings that end the completion; they are not part of its text."""
    bad_words: tuple[str, ...] = ()
    """Texts that the completion does not contain as tokens, alone or after a space."""
    structured: StructuredOutput | None = None
    """Structured output, of `lowlat.generate.structured`. Needs the package llguidance."""

    def __post_init__(self) -> None:
        TokenSamplingParams.__post_init__(self)
        if not isinstance(self.stop, tuple) or len(self.stop) > MAX_STOPS:
            raise UserError(f"stop must be a tuple of at most {MAX_STOPS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_STOP_LENGTH:
                raise UserError(f"stop: every string must have 1 to {MAX_STOP_LENGTH} characters")
        self._check_bad_words()
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise UserError(
                "structured must be a JsonObject, JsonSchema, Regex, Choice or Grammar of "
                f"lowlat.generate.structured, got {self.structured!r}"
            )
        if self.structured is not None and self.ignore_eos:
            raise UserError("structured outputs end; set ignore_eos to False")

    def _check_bad_words(self) -> None:
        if not isinstance(self.bad_words, tuple) or len(self.bad_words) > MAX_BAD_WORDS:
            raise UserError(f"bad_words must be a tuple of at most {MAX_BAD_WORDS} strings")
        for text in self.bad_words:
            if not isinstance(text, str) or not 1 <= len(text) <= MAX_BAD_WORD_LENGTH:
                raise UserError(
                    f"bad_words: every string must have 1 to {MAX_BAD_WORD_LENGTH} characters"
                )
        if self.bad_words and self.allowed_token_ids is not None:
            raise UserError("bad_words cannot be combined with allowed_token_ids; leave one out")
        if self.structured is not None and self.limits_tokens:
            raise UserError(
                "structured outputs cannot be combined with min_tokens, allowed_token_ids or"
                " bad_words; leave them out"
            )

    @property
    def limits_tokens(self) -> bool:
        """Whether tokens are banned."""
        return bool(self.bad_words or self.min_tokens or self.allowed_token_ids is not None)


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments; tuples may be lists, `stop` one string."""

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
    min_tokens: int
    stop_token_ids: Sequence[int]
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str]
    structured: StructuredOutput | None


def check_each(params: object, count: int) -> None:
    """Raises UserError unless `params` are SamplingParams for each of `count` prompts."""
    each = params if isinstance(params, Sequence) else [params]
    if strange := [own for own in each if not isinstance(own, SamplingParams)]:
        raise UserError(f"params must be SamplingParams, or a list of them, not {strange[0]!r}")
    if len(each) != count:
        raise UserError(f"{count} prompts need as many params, got {len(each)}")


def make_params(options: SamplingOptions) -> SamplingParams:
    """SamplingParams from keyword arguments. Raises UserError for unknown names and bad values."""
    unknown = sorted(set(options) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        known = ", ".join(SamplingParams.__dataclass_fields__)
        raise UserError(f"option '{unknown[0]}' is unknown; the sampling options are {known}")
    lists = {
        name: tuple(value)
        for name in ("stop_token_ids", "allowed_token_ids", "bad_words")
        if isinstance(value := options.get(name), list)
    }
    return SamplingParams(**{**options, "stop": _stops(options.get("stop")), **lists})


def _stops(stop: object) -> tuple[Any, ...]:
    """`stop` as the tuple that SamplingParams takes and checks."""
    if stop is None:
        return ()
    if isinstance(stop, Sequence):
        return (stop,) if isinstance(stop, str) else tuple(stop)
    raise UserError(f"stop must be a string or a list of strings, got {stop!r}")
