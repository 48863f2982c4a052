"""Chat packing: best-fit packing of whole chats into rows, padded with masked tokens.

No chat is split across rows, so every answer has its question; a chat longer than a row is
truncated. The seed decides which chats share a row, and rows are shuffled in every epoch, so the
position in the data is one number, as in `packing`, which packs plain text.

Memory: 8 bytes per chat, and 4 per row and epoch.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer

from lowlat.data.batch import Batch
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.fim import FillInTheMiddle
from lowlat.data.manifest import Split
from lowlat.data.packing import DOCUMENT_ORDER, KEPT_EPOCHS, WINDOW_ORDER, extents
from lowlat.data.shuffle import permutation


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncatedChats:
    """Statistics of truncated chats."""

    chats: int
    """Chats longer than a row."""
    tokens: int
    """Tokens cut off."""
    longest: int
    """Tokens of the longest chat."""


class PackedChats:
    """Rows of one split of chats. Not thread-safe."""

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
        """As `PackedSequences`. Raises UserError if fim_rate is not 0."""
        FillInTheMiddle(folder, split, rate=fim_rate, seed=seed)  # raises for chats
        self._folder = folder
        self._split: Split = split
        self._sequence_length = sequence_length
        self._length = sequence_length + num_ahead
        self._seed = seed
        self._document_masks = document_masks
        self._ends = folder.ends(split)
        # The token after the inputs is a target, so a chat may end with it.
        room = sequence_length + 1
        order = permutation(len(self._ends), seed, 0, DOCUMENT_ORDER)
        _, sizes = extents(self._ends, order.astype(np.int64))
        rows = packed(np.minimum(sizes, room), room)
        by_row = np.argsort(rows, kind="stable")
        self._chats = order[by_row]
        self.per_epoch = int(rows.max()) + 1
        """Rows of one epoch."""
        self._firsts = np.searchsorted(rows[by_row], np.arange(self.per_epoch + 1))
        self.truncated = TruncatedChats(
            chats=int((sizes > room).sum()),
            tokens=int(np.maximum(sizes - room, 0).sum()),
            longest=int(sizes.max()),
        )
        self._orders: dict[int, np.ndarray] = {}

    def has_targets(self, count: int | None = None) -> bool:
        """Whether the main head has a target in the first `count` rows, by default an epoch."""
        order = self._order(0)[:count]
        return any(bool(self._loss_mask(*self._places(int(row)))[1:].any()) for row in order)

    def batch(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1, counted over all epochs."""
        tokens = np.full((count, self._length), self._folder.manifest.end_of_text, np.int64)
        loss_mask = np.zeros((count, self._length), np.bool_)
        documents = []
        for row in range(count):
            number, index = divmod(first + row, self.per_epoch)
            own = int(self._order(number)[index])
            documents.append(self._fill(own, tokens[row], loss_mask[row]))
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(loss_mask),
            documents=tuple(documents) if self._document_masks else None,
        )

    def _order(self, epoch: int) -> Integer[np.ndarray, " rows"]:
        if epoch not in self._orders:
            while len(self._orders) >= KEPT_EPOCHS:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = permutation(self.per_epoch, self._seed, epoch, WINDOW_ORDER)
        return self._orders[epoch]

    def _fill(
        self,
        row: int,
        tokens: Int64[np.ndarray, " length"],
        loss_mask: Bool[np.ndarray, " length"],
    ) -> tuple[int, ...]:
        """Write one row; returns the lengths of the chats in its inputs, then of the padding."""
        positions, borders = self._places(row)
        used = len(positions)
        tokens[:used] = self._folder.tokens(self._split, positions)
        loss_mask[:used] = self._loss_mask(positions, borders)
        inside = np.minimum(np.append(borders, self._length), self._sequence_length)
        lengths = np.diff(inside)
        return tuple(lengths[lengths > 0].tolist())

    def _places(
        self, row: int
    ) -> tuple[Int64[np.ndarray, " used"], Int64[np.ndarray, " chats_and_one"]]:
        """Positions in the split of the tokens of `row`, and the offsets in the row at which its
        chats begin and the last one ends.
        """
        chats = self._chats[self._firsts[row] : self._firsts[row + 1]].astype(np.int64)
        starts, sizes = extents(self._ends, chats)
        sizes = np.minimum(sizes, self._sequence_length + 1)
        borders = np.concatenate([[0], np.cumsum(sizes)])
        return np.arange(borders[-1]) + np.repeat(starts - borders[:-1], sizes), borders

    def _loss_mask(
        self,
        positions: Int64[np.ndarray, " used"],
        borders: Int64[np.ndarray, " chats_and_one"],
    ) -> Bool[np.ndarray, " used"]:
        """Loss mask of the tokens at `positions`."""
        loss_mask = self._folder.loss_mask(self._split, positions)
        if self._document_masks:
            loss_mask[borders[:-1]] = False
        return loss_mask


def packed(sizes: Int64[np.ndarray, " documents"], room: int) -> Int64[np.ndarray, " documents"]:
    """Best-fit bin packing: the row of every document, in rows of `room` tokens.

    In order, each document goes to the row that it leaves the least space in, or to a new row.
    """
    rows = np.empty(len(sizes), np.int64)
    by_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys above, in order
    count = 0
    for index, size in enumerate(sizes.tolist()):
        place = bisect_left(spaces, size)
        if place == len(spaces):
            space, row = room, count
            count += 1
        else:
            space = spaces[place]
            row = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[place]
        rows[index] = row
        if size < space:
            if space - size not in by_space:
                insort(spaces, space - size)
            by_space.setdefault(space - size, []).append(row)
    return rows
