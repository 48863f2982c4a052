"""Token bans of one completion: min_tokens, allowed_token_ids and bad words.

They depend on the completion's own tokens only, so batch composition changes nothing.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.engine.params import TokenSamplingParams


class TokenBans:
    """The tokens that a completion may not contain next; call `record` with every output token."""

    def __init__(
        self,
        params: TokenSamplingParams,
        *,
        end_ids: frozenset[int],
        bad_words: Sequence[tuple[int, ...]],
        vocab_size: int,
    ) -> None:
        """end_ids: tokens that end the completion. bad_words: sequences of token ids, not empty."""
        self._min_tokens = params.min_tokens
        self._ends = _ids(sorted(id for id in end_ids if id < vocab_size))
        self._bad_words = bad_words
        self._tail: list[int] = []
        """The last output tokens, as many as a bad word may need."""
        self._longest = max((len(word) for word in bad_words), default=1) - 1
        self._num_outputs = 0
        self._forbidden: Tensor | None = None
        if params.allowed_token_ids is not None:
            self._forbidden = torch.ones(vocab_size, dtype=torch.bool)
            self._forbidden[_ids(params.allowed_token_ids)] = False

    @property
    def any(self) -> bool:
        """Whether a token may be banned, now or later."""
        return bool(self._bad_words) or self._min_tokens > 0 or self._forbidden is not None

    def record(self, token: int) -> None:
        self._num_outputs += 1
        if self._longest > 0:
            self._tail = [*self._tail, token][-self._longest :]

    def apply(self, logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        """`logits` with -inf for banned tokens."""
        if self._forbidden is not None:
            logits = logits.masked_fill(self._forbidden, -math.inf)
        banned = [word[-1] for word in self._bad_words if self._ends_with(word[:-1])]
        if banned:
            logits = logits.index_fill(0, _ids(banned), -math.inf)
        if self._num_outputs < self._min_tokens:
            logits = logits.index_fill(0, self._ends, -math.inf)
        return logits

    def _ends_with(self, tokens: tuple[int, ...]) -> bool:
        return not tokens or tuple(self._tail[-len(tokens) :]) == tokens


def _ids(ids: Sequence[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64)
