"""Log-probabilities of prompt tokens: one record per token, stored in flat lists."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import final, overload


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """Log-probability of a prompt token, given those before it."""

    token: int
    logprob: float
    """Natural log of the token's probability under the softmax of the raw logits."""
    rank: int
    """1 for the likeliest token."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, best first."""


@final
@dataclass(slots=True)
class PromptLogprobs(Sequence[PromptLogprob]):
    """The records of a prompt, made on access: a long prompt has too many for the garbage
    collector, whose pauses grow with the number of objects.
    """

    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _ranks: list[int] = field(default_factory=list)
    _top_tokens: list[int] = field(default_factory=list)
    _top_logprobs: list[float] = field(default_factory=list)
    _num_top: int = 0
    """Likeliest tokens per record."""

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> PromptLogprob: ...
    @overload
    def __getitem__(self, index: slice) -> list[PromptLogprob]: ...
    def __getitem__(self, index: int | slice) -> PromptLogprob | list[PromptLogprob]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        span = slice(place * self._num_top, (place + 1) * self._num_top)
        top = zip(self._top_tokens[span], self._top_logprobs[span], strict=True)
        return PromptLogprob(
            self._tokens[place], self._logprobs[place], self._ranks[place], tuple(top)
        )

    def extend(self, records: Iterable[PromptLogprob]) -> None:
        """Add records, which have equally many likeliest tokens."""
        for record in records:
            self._tokens.append(record.token)
            self._logprobs.append(record.logprob)
            self._ranks.append(record.rank)
            self._top_tokens += [token for token, _ in record.top]
            self._top_logprobs += [logprob for _, logprob in record.top]
            self._num_top = len(record.top)

    def truncate(self, length: int) -> None:
        """Keep the first `length` records."""
        for values in (self._tokens, self._logprobs, self._ranks):
            del values[length:]
        for values in (self._top_tokens, self._top_logprobs):
            del values[length * self._num_top :]
