"""Token-level sampling parameters: one validated record per request.

Owns the options, their ranges and their contradictions; `engine.sampler` applies them. Options
about text (stop strings, structured outputs) are `generate.params`'s. An option without effect is
an error, never ignored.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import SupportsIndex

from lowlat.utils.errors import UserError

MAX_TOKENS = 1 << 20
MAX_N = 128
MAX_TOP_K = 1 << 20
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_ALLOWED_TOKEN_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSamplingParams:
    """Sampling options of one request; the defaults are greedy decoding up to the context.

    Raises UserError naming the option and its range. Options are applied in this order: repetition,
    frequency and presence penalty, logit_bias, temperature, top_k, top_p, min_p.
    """

    max_tokens: int | None = None
    """Most tokens to generate; None stops at the end of the context."""
    temperature: int | float = 0.0
    """Divides the logits; 0 takes the likeliest token (lowest id among equals)."""
    top_k: int = 0
    """Keep the k likeliest tokens (lowest ids among equals); 0 keeps all."""
    top_p: int | float = 1.0
    """Keep the fewest likeliest tokens whose probabilities sum to at least top_p; 1 keeps all."""
    min_p: int | float = 0.0
    """Keep tokens at least min_p times as probable as the likeliest; 0 keeps all."""
    repetition_penalty: int | float = 1.0
    """Divides (if positive) or multiplies (if not) the logits of tokens in prompt or output."""
    presence_penalty: int | float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: int | float = 0.0
    """Subtracted from a token's logit once per occurrence in the output."""
    logit_bias: Mapping[int, int | float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Seed of the request's own generator; None: a fresh one. Greedy output needs none."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many alternatives; None returns none.

    They are the model's own: log-softmax of its logits before penalties, bias, temperature and
    filters.
    """
    n: int = 1
    """Independent completions of the one prompt (parallel sampling)."""
    ignore_eos: bool = False
    """Continue after the end-of-sequence token."""
    min_tokens: int = 0
    """No end-of-sequence or stop token before this many tokens; stop strings still end."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the completion; they are not part of its text."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only token ids that may be generated; None allows all."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_int("top_k", self.top_k, 0, MAX_TOP_K)
        _check_int("n", self.n, 1, MAX_N)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        if not isinstance(self.ignore_eos, bool):
            raise UserError(f"ignore_eos must be true or false, got {self.ignore_eos!r}")
        self._check_floats()
        self._check_logit_bias()
        self._check_ids()
        if self.is_greedy:
            self._check_greedy()

    def _check_floats(self) -> None:
        _check_float("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < self.temperature < 1e-4:
            raise UserError(
                f"temperature must be 0 (greedy) or at least 0.0001, got {self.temperature!r}"
            )
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)

    def _check_logit_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping) or len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise UserError(f"logit_bias must map at most {MAX_LOGIT_BIAS} token ids to numbers")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias: a token id", token, 0, (1 << 31) - 1)
            _check_float(f"logit_bias of token {token}", bias, -100.0, 100.0)

    def _check_ids(self) -> None:
        _check_int("min_tokens", self.min_tokens, 0, MAX_TOKENS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(
                f"min_tokens {self.min_tokens} exceeds max_tokens {self.max_tokens}; lower it"
            )
        for name, ids, most in (
            ("stop_token_ids", self.stop_token_ids, MAX_STOP_TOKEN_IDS),
            ("allowed_token_ids", self.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS),
        ):
            if ids is None:
                continue
            if not isinstance(ids, tuple) or len(ids) > most:
                raise UserError(f"{name} must be a tuple of at most {most} token ids")
            for token in ids:
                _check_int(f"{name}: a token id", token, 0, (1 << 31) - 1)
        if self.allowed_token_ids == ():
            raise UserError("allowed_token_ids is empty; list tokens, or leave it out")

    def _check_greedy(self) -> None:
        # Every filter keeps the likeliest token, which is the one temperature 0 takes. top_k 1 and
        # a seed agree with greedy decoding and are allowed.
        for name, is_off in (
            ("top_k", self.top_k <= 1),
            ("top_p", self.top_p == 1.0),
            ("min_p", self.min_p == 0.0),
        ):
            if not is_off:
                raise UserError(
                    f"{name} has no effect with temperature 0; set temperature above 0 or leave "
                    f"{name} out"
                )
        if self.n > 1:
            raise UserError(
                f"n {self.n} with temperature 0 gives {self.n} equal completions; set temperature "
                "above 0 or n to 1"
            )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether tokens of prompt or output change the logits."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def integer_of(value: object) -> int | None:
    """`value` as a plain int (NumPy and PyTorch integers too); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def _check_float(
    name: str, value: int | float, low: float, high: float, *, above: bool = False
) -> None:
    """Raise UserError unless `value` is a finite number in [low, high]; with `above`, in (low,
    high]."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails every comparison, and so is refused.
    if not is_number or not low <= value <= high or (above and value == low):
        start = f"above {low:g}" if above else f"from {low:g}"
        raise UserError(f"{name} must be a number {start} to {high:g}, got {value!r}")
