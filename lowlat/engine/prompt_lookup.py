"""Prompt lookup (n-gram speculation): draft tokens from an earlier occurrence of the latest tokens.

Owns the search in one sequence's tokens.
"""

from collections.abc import Sequence

import numpy as np

MIN_MATCH = 2
"""Shortest n-gram that must recur."""
MAX_MATCH = 8
NUM_CANDIDATES = 32
"""Latest occurrences that are compared for the longest match."""


class PromptLookup:
    """Finds the longest recent n-gram match of a growing sequence's last tokens."""

    def __init__(self) -> None:
        self._tokens = np.empty(256, dtype=np.int32)
        self._length = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` draft tokens after `tokens`, which must extend those of the last call."""
        self._extend(tokens)
        known = self._tokens[: self._length]
        if len(known) <= MIN_MATCH:
            return []
        # Ends of earlier occurrences of the last MIN_MATCH tokens.
        is_match = known[MIN_MATCH - 1 : -1] == known[-1]
        for back in range(1, MIN_MATCH):
            is_match &= known[MIN_MATCH - 1 - back : -1 - back] == known[-1 - back]
        ends = np.flatnonzero(is_match)[-NUM_CANDIDATES:] + MIN_MATCH
        if len(ends) == 0:
            return []
        # The latest of the longest matches.
        best = max((_match_length(known, int(end)), int(end)) for end in ends)[1]
        return [int(token) for token in known[best : best + most]]

    def _extend(self, tokens: Sequence[int]) -> None:
        while len(self._tokens) < len(tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self._length : len(tokens)] = tokens[self._length :]
        self._length = len(tokens)


def _match_length(known: np.ndarray, end: int) -> int:
    """Number of tokens before `end` that equal the last tokens, up to MAX_MATCH."""
    longest = min(MAX_MATCH, end)
    differs = np.flatnonzero(known[end - longest : end] != known[len(known) - longest :])
    return longest if len(differs) == 0 else longest - 1 - int(differs[-1])
