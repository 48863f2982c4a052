"""Training batch: token ids, loss mask and document boundaries, with tokens for MTP."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of sequence_length tokens and the tokens that follow each row.

    length = sequence_length + 1 + num_nextn_predict_layers: inputs are the first sequence_length
    tokens T, the main targets the same shifted by one, and MTP module k (from 0) embeds
    tokens[:, k + 1 : T + k + 1] to predict tokens[:, k + 2 : T + k + 2] (DeepSeek-V3 section 2.2).
    """

    tokens: Int[Tensor, "rows length"]
    """Token ids."""
    loss_mask: Bool[Tensor, "rows length"]
    """Whether each token is a target."""
    documents: tuple[tuple[int, ...], ...] | None = None
    """Document mask: per row, lengths of the documents in its first sequence_length tokens, which
    are masked from one another in attention (varlen attention); None: every row is one sequence.
    """

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    def sequence_length(self, num_ahead: int) -> int:
        """Tokens of a row that are inputs; num_ahead = 1 + num_nextn_predict_layers."""
        return self.tokens.shape[1] - num_ahead

    def lengths(self, num_ahead: int) -> list[int]:
        """Lengths of all attention sequences, row after row."""
        if self.documents is None:
            return [self.sequence_length(num_ahead)] * self.rows
        return [length for row in self.documents for length in row]

    def split(self, rows: int) -> Iterator["Batch"]:
        """Parts of at most `rows` rows, in order."""
        for first in range(0, self.rows, rows):
            last = first + rows
            documents = None if self.documents is None else self.documents[first:last]
            yield Batch(
                tokens=self.tokens[first:last],
                loss_mask=self.loss_mask[first:last],
                documents=documents,
            )

    def to(self, device: torch.device | str) -> "Batch":
        """The same on `device`."""
        return Batch(
            tokens=self.tokens.to(device),
            loss_mask=self.loss_mask.to(device),
            documents=self.documents,
        )
