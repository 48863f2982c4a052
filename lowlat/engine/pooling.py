"""Embedding pooling: final hidden states of a prompt as one vector (cls, mean or last token)."""

import torch
from torch import Tensor

from lowlat.engine.request import PoolingMode


class PoolingState:
    """Hidden states of one prompt, pooled chunk by chunk.

    The sum of a mean adds one token after the other in fp64, so that it does not depend on how the
    prompt is divided into chunks.
    """

    def __init__(self, mode: PoolingMode) -> None:
        self._mode = mode
        self._pooled: Tensor | None = None
        self._count = 0

    def add(self, start: int, hidden: Tensor) -> None:
        """Add [tokens, hidden] of the tokens from position `start` on; 0 begins again."""
        if start == 0:
            self._pooled, self._count = None, 0
        # A copy: the next step may overwrite the hidden states.
        states = hidden.to(torch.float64, copy=True)
        if self._mode == "lasttoken":
            self._pooled = states[-1]
        elif self._mode == "cls":
            self._pooled = states[0] if self._pooled is None else self._pooled
        else:
            for row in states:
                self._pooled = row if self._pooled is None else self._pooled.add_(row)
        self._count += len(hidden)

    def result(self) -> tuple[float, ...]:
        """The embedding, not normalized."""
        assert self._pooled is not None
        pooled = self._pooled / self._count if self._mode == "mean" else self._pooled
        return tuple(pooled.tolist())
