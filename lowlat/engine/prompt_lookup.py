"""Drafts without a draft model: what followed the last time these tokens came (prompt lookup).

Owns the search in one sequence's tokens.
"""

from collections.abc import Sequence

import numpy as np

MIN_MATCH = 2
"""Tokens that must recur before a guess is made."""
MAX_MATCH = 8
NUM_CANDIDATES = 32
"""Latest recurrences that are compared for the longest match."""


class PromptLookup:
    """Finds the longest recent recurrence of a growing sequence's end."""

    def __init__(self) -> None:
        self._tokens = np.empty(256, dtype=np.int32)
        self._length = 0

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which start with those of the last call."""
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
    """Tokens before `end` that equal those at the end of all, up to MAX_MATCH."""
    longest = min(MAX_MATCH, end)
    differs = np.flatnonzero(known[end - longest : end] != known[len(known) - longest :])
    return longest if len(differs) == 0 else longest - 1 - int(differs[-1])
