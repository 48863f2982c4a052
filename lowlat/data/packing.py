"""Sequence packing, the dataloader of training: text or chats in rows of one length, in a
deterministic endless order, with random access by index.

A run's position in the data is one number: any layout of processes reads the same tokens, and a
resumed run continues exactly. Text is joined and cut into windows (`PackedSequences`), chats stay
whole (`PackedChats`). `fim` rearranges documents, `dataset` reads tokens.
"""

from abc import ABC, abstractmethod
from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import final

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


class PackedRows(ABC):
    """Rows of one split. Not thread-safe."""

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
        """A row has `sequence_length` tokens and the next `num_ahead` = 1 + MTP depth tokens.

        Raises UserError for a split that does not fill a window, and as `FillInTheMiddle`: for
        chats if fim_rate is not 0.
        """
        self._folder = folder
        self._split: Split = split
        self._sequence_length = sequence_length
        self._length = sequence_length + num_ahead
        self._seed = seed
        self._document_masks = document_masks
        self._infilling = FillInTheMiddle(folder, split, rate=fim_rate, seed=seed)
        self._ends = folder.ends(split)
        self.per_epoch = self._prepare()
        """Rows of one epoch."""

    @abstractmethod
    def _prepare(self) -> int:
        """Plan the epochs; returns `per_epoch`."""

    @abstractmethod
    def _fill(
        self,
        epoch: int,
        index: int,
        tokens: Int64[np.ndarray, " length"],
        loss_mask: Bool[np.ndarray, " length"],
    ) -> tuple[int, ...]:
        """Write row `index` of `epoch` over padding; returns the lengths of the documents in its
        inputs, then of the padding.
        """

    def has_targets(self, count: int | None = None) -> bool:
        """Whether the main head has a target in the first `count` rows, by default an epoch."""
        rows = self.per_epoch if count is None else min(count, self.per_epoch)
        ahead = slice(1, self._sequence_length + 1)
        return any(bool(self.batch(row, 1).loss_mask[:, ahead].any()) for row in range(rows))

    def batch(self, first: int, count: int) -> Batch:
        """Rows first .. first + count - 1, counted over all epochs."""
        tokens = np.full((count, self._length), self._folder.manifest.end_of_text, np.int64)
        loss_mask = np.zeros((count, self._length), np.bool_)
        documents = []
        for row in range(count):
            epoch, index = divmod(first + row, self.per_epoch)
            documents.append(self._fill(epoch, index, tokens[row], loss_mask[row]))
        return Batch(
            tokens=torch.from_numpy(tokens),
            loss_mask=torch.from_numpy(loss_mask),
            documents=tuple(documents) if self._document_masks else None,
        )

    def _lengths(self, borders: Int64[np.ndarray, " documents_and_one"]) -> tuple[int, ...]:
        """Lengths of the documents between `borders` of a row, in its inputs."""
        lengths = np.diff(np.minimum(borders, self._sequence_length))
        return tuple(lengths[lengths > 0].tolist())


@final
class PackedSequences(PackedRows):
    """Windows of joined documents.

    In every epoch the documents are shuffled and joined, the stream is cut into windows, and the
    windows are shuffled. The tokens after a window's `sequence_length` are also the first of the
    next window. The last tokens of an epoch that do not fill a window are dropped.

    An epoch takes 12 bytes of memory per document and 4 per window (16 and 8 from 2^32 on), and two
    epochs are cached.
    """

    def _prepare(self) -> int:
        """As many windows with one MTP module as with none: models share their windows."""
        tokens, length = self._folder.num_tokens(self._split), self._sequence_length
        ahead = self._length - length
        windows = (tokens - ahead) // length
        if windows > 1:
            windows = (tokens - max(ahead, LEAST_AHEAD)) // length
        if windows < 1:
            raise UserError(
                f"{self._folder.path}: {self._split} has {tokens} tokens, fewer than the"
                f" {self._length} of a window; shorten the sequence or add documents"
            )
        make = partial(_Epoch, self._ends, self._infilling, windows=windows, seed=self._seed)
        self._epoch = lru_cache(KEPT_EPOCHS)(make)
        return windows

    def _fill(
        self,
        epoch: int,
        index: int,
        tokens: Int64[np.ndarray, " length"],
        loss_mask: Bool[np.ndarray, " length"],
    ) -> tuple[int, ...]:
        order = self._epoch(epoch)
        start = int(order.windows[index]) * self._sequence_length
        stop = start + self._length
        first = int(np.searchsorted(order.starts, start, side="right")) - 1
        last = int(np.searchsorted(order.starts, stop, side="left"))
        begins = order.starts[first:last]
        borders = np.append(np.maximum(begins, start), stop)
        lengths = np.diff(borders)
        inside = np.arange(start, stop) - np.repeat(begins, lengths)
        documents = order.documents[first:last].astype(np.int64)
        places, sizes = extents(self._ends, documents)
        positions = inside + np.repeat(places, lengths)
        for place in np.flatnonzero(self._infilling.chosen(documents, sizes, epoch)):
            own = slice(borders[place] - start, borders[place + 1] - start)
            extent = (int(documents[place]), int(places[place]), int(sizes[place]))
            positions[own] = self._infilling.positions(*extent, epoch, inside[own])
        tokens[:] = self._infilling.tokens(positions)
        loss_mask[:] = self._folder.loss_mask(self._split, np.maximum(positions, 0))
        if self._document_masks:
            loss_mask[inside == 0] = False
        return self._lengths(borders - start)


class _Epoch:
    """The order of documents and windows in one epoch."""

    def __init__(
        self,
        ends: Int64[np.ndarray, " documents"],
        infilling: FillInTheMiddle,
        number: int,
        *,
        windows: int,
        seed: int,
    ) -> None:
        self.documents = permutation(len(ends), seed, number, DOCUMENT_ORDER)
        """Order of documents in the stream."""
        every = np.arange(len(ends))
        _, lengths = extents(ends, every)
        lengths += NUM_MARKS * infilling.chosen(every, lengths, number)
        self.starts = np.zeros(len(ends) + 1, np.int64)
        """Start of each document in the stream, and the end of the last."""
        np.cumsum(lengths[self.documents], out=self.starts[1:])
        self.windows = permutation(windows, seed, number, WINDOW_ORDER)
        """Order of windows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TruncatedChats:
    """Statistics of truncated chats."""

    chats: int
    """Chats longer than a row."""
    tokens: int
    """Tokens cut off."""
    longest: int
    """Tokens of the longest chat."""


@final
class PackedChats(PackedRows):
    """Whole chats, best-fit packed into rows and padded with masked tokens.

    No chat is split across rows, so every answer has its question; a chat longer than a row is
    truncated. The seed decides which chats share a row, and rows are shuffled in every epoch.

    Memory: 8 bytes per chat, and 4 per row and epoch.
    """

    def _prepare(self) -> int:
        # The token after the inputs is a target, so a chat may end with it.
        room, seed = self._sequence_length + 1, self._seed
        order = permutation(len(self._ends), seed, 0, DOCUMENT_ORDER)
        _, sizes = extents(self._ends, order.astype(np.int64))
        rows = packed(np.minimum(sizes, room), room)
        by_row = np.argsort(rows, kind="stable")
        self._chats = order[by_row]
        count = int(rows.max()) + 1
        self._firsts = np.searchsorted(rows[by_row], np.arange(count + 1))
        self.truncated = TruncatedChats(
            chats=int((sizes > room).sum()),
            tokens=int(np.maximum(sizes - room, 0).sum()),
            longest=int(sizes.max()),
        )
        self._order = lru_cache(KEPT_EPOCHS)(
            lambda epoch: permutation(count, seed, epoch, WINDOW_ORDER)
        )
        return count

    def _fill(
        self,
        epoch: int,
        index: int,
        tokens: Int64[np.ndarray, " length"],
        loss_mask: Bool[np.ndarray, " length"],
    ) -> tuple[int, ...]:
        row = int(self._order(epoch)[index])
        chats = self._chats[self._firsts[row] : self._firsts[row + 1]].astype(np.int64)
        starts, sizes = extents(self._ends, chats)
        sizes = np.minimum(sizes, self._sequence_length + 1)
        borders = np.concatenate([[0], np.cumsum(sizes)])
        positions = np.arange(borders[-1]) + np.repeat(starts - borders[:-1], sizes)
        used = len(positions)
        tokens[:used] = self._folder.tokens(self._split, positions)
        loss_mask[:used] = self._folder.loss_mask(self._split, positions)
        if self._document_masks:
            loss_mask[borders[:-1]] = False
        return self._lengths(np.append(borders, self._length))


def extents(
    ends: Int64[np.ndarray, " documents"], chosen: Int64[np.ndarray, " n"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Starts of the `chosen` documents in the split, and their lengths in tokens."""
    starts = np.where(chosen > 0, ends[chosen - 1], 0)
    return starts, ends[chosen] - starts


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
