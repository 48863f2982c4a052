"""Sequence packing: documents joined and cut into windows, in a deterministic endless order, with
random access by index.

In every epoch the documents are shuffled and joined, the stream is cut into windows, and the
windows are shuffled. A run's position in the data is one number: any layout of processes reads the
same tokens, and a resumed run continues exactly. The last tokens of an epoch that do not fill a
window are dropped.

An epoch takes 12 bytes of memory per document and 4 per window (16 and 8 from 2^32 on), and two
epochs are cached. `fim` rearranges documents, `dataset` reads tokens.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int64

from lowlat.data.batch import Batch
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.fim import NUM_MARKS, FillInTheMiddle
from lowlat.data.manifest import Split
from lowlat.data.shuffle import permutation
from lowlat.utils.errors import UserError

DOCUMENT_ORDER, WINDOW_ORDER = 1, 2
KEPT_EPOCHS = 2
LEAST_AHEAD = 2
"""Tokens after the last of several windows, as many as a model with one MTP module needs."""


class PackedSequences:
    """Windows of one split. Not thread-safe."""

    def __init__(
        self,
        folder: TokenizedDataset,
        *,
        split: Split,
        sequence_length: int,
        num_ahead: int,
        seed: int,
        document_masks: bool,
        fim_rate: float,
    ) -> None:
        """A window has `sequence_length` tokens and the next `num_ahead` = 1 + MTP depth tokens,
        which are also the first tokens of the next window.

        Raises UserError if the split does not fill a window, and as `FillInTheMiddle`.
        """
        tokens = folder.num_tokens(split)
        self.per_epoch = (tokens - num_ahead) // sequence_length
        """Windows per epoch: the same number with zero and one MTP module, so that both models
        train and evaluate on the same windows.
        """
        if self.per_epoch > 1:
            self.per_epoch = (tokens - max(num_ahead, LEAST_AHEAD)) // sequence_length
        if self.per_epoch < 1:
            raise UserError(
                f"{folder.path}: {split} has {tokens} tokens, fewer than the"
                f" {sequence_length + num_ahead} of a window; shorten the sequence or add documents"
            )
        self._folder = folder
        self._split: Split = split
        self._sequence_length = sequence_length
        self._length = sequence_length + num_ahead
        self._seed = seed
        self._document_masks = document_masks
        self._infilling = FillInTheMiddle(folder, split, rate=fim_rate, seed=seed)
        self._ends = folder.ends(split)
        self._epochs: dict[int, _Epoch] = {}

    def has_targets(self, count: int | None = None) -> bool:
        """Whether the main head has a target in the first `count` windows, by default an epoch."""
        rows = self.per_epoch if count is None else min(count, self.per_epoch)
        ahead = slice(1, self._sequence_length + 1)
        return any(bool(self.batch(row, 1).loss_mask[:, ahead].any()) for row in range(rows))

    def batch(self, first: int, count: int) -> Batch:
        """Windows first .. first + count - 1, counted over all epochs."""
        tokens = np.empty((count, self._length), np.int64)
        loss_mask = np.empty((count, self._length), np.bool_)
        documents = []
        for row in range(count):
            number, index = divmod(first + row, self.per_epoch)
            epoch = self._epoch(number)
            lengths = self._fill(epoch, int(epoch.windows[index]), tokens[row], loss_mask[row])
            documents.append(lengths)
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(loss_mask),
            documents=tuple(documents) if self._document_masks else None,
        )

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            while len(self._epochs) >= KEPT_EPOCHS:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[number] = _Epoch(
                number, self._ends, self._infilling, windows=self.per_epoch, seed=self._seed
            )
        return self._epochs[number]

    def _fill(
        self,
        epoch: "_Epoch",
        window: int,
        tokens: Int64[np.ndarray, " length"],
        loss_mask: Bool[np.ndarray, " length"],
    ) -> tuple[int, ...]:
        """Write one window; returns the lengths of the documents in its inputs."""
        start = window * self._sequence_length
        stop = start + self._length
        first = int(np.searchsorted(epoch.starts, start, side="right")) - 1
        last = int(np.searchsorted(epoch.starts, stop, side="left"))
        begins = epoch.starts[first:last]
        borders = np.append(np.maximum(begins, start), stop)
        lengths = np.diff(borders)
        inside = np.arange(start, stop) - np.repeat(begins, lengths)
        documents = epoch.order[first:last].astype(np.int64)
        places, sizes = extents(self._ends, documents)
        positions = inside + np.repeat(places, lengths)
        for index in np.flatnonzero(self._infilling.chosen(documents, sizes, epoch.number)):
            own = slice(borders[index] - start, borders[index + 1] - start)
            extent = (int(documents[index]), int(places[index]), int(sizes[index]))
            positions[own] = self._infilling.positions(*extent, epoch.number, inside[own])
        tokens[:] = self._infilling.tokens(positions)
        loss_mask[:] = self._folder.loss_mask(self._split, np.maximum(positions, 0))
        if self._document_masks:
            loss_mask[inside == 0] = False
        lengths = np.diff(np.minimum(borders, start + self._sequence_length))
        return tuple(lengths[lengths > 0].tolist())


class _Epoch:
    """The order of documents and windows in one epoch."""

    def __init__(
        self,
        number: int,
        ends: Int64[np.ndarray, " documents"],
        infilling: FillInTheMiddle,
        *,
        windows: int,
        seed: int,
    ) -> None:
        self.number = number
        self.order = permutation(len(ends), seed, number, DOCUMENT_ORDER)
        """Order of documents in the stream."""
        documents = np.arange(len(ends))
        _, lengths = extents(ends, documents)
        lengths += NUM_MARKS * infilling.chosen(documents, lengths, number)
        self.starts = np.zeros(len(ends) + 1, np.int64)
        """Start of each document in the stream, and the end of the last."""
        np.cumsum(lengths[self.order], out=self.starts[1:])
        self.windows = permutation(windows, seed, number, WINDOW_ORDER)
        """Order of windows."""


def extents(
    ends: Int64[np.ndarray, " documents"], chosen: Int64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Starts of the `chosen` documents in the split, and their lengths in tokens."""
    starts = np.where(chosen > 0, ends[chosen - 1], 0)
    return starts, ends[chosen] - starts
