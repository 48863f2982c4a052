"""Fill-in-the-middle (FIM): some documents are rearranged as prefix, suffix, middle (arXiv
2207.14255; DeepSeek-V3 section 4.1).

    begin <prefix> first <suffix> last <middle> between end

Owns which documents, where they are cut and where each token of the rearranged document comes from.
Cuts lie between tokens, so tokens stay those of the plain text, and never inside a character: a
token that begins with a later byte of one stays with the token before it.
"""

import numpy as np
from jaxtyping import Bool, Int64, Integer

from lowlat.data.dataset import TokenizedDataset
from lowlat.data.manifest import Split
from lowlat.data.shuffle import uniform
from lowlat.utils.errors import UserError

MIN_TOKENS = 32
"""Shorter documents are left as they are."""
NUM_MARKS = 3
CHOICE, FIRST_CUT, SECOND_CUT = 101, 102, 103
MAX_INSIDE = 3
"""A character has at most four bytes, so at most three tokens begin inside it."""


class FillInTheMiddle:
    """Fill-in-the-middle documents of one split, different ones in every epoch."""

    def __init__(self, folder: TokenizedDataset, split: Split, *, rate: float, seed: int) -> None:
        """`rate` is the share of documents. Raises UserError for a rate outside 0..1, and where
        the tokenizer has no tokens for infilling or the documents are chats.
        """
        if not 0.0 <= rate <= 1.0:
            raise UserError(f"fim_rate {rate} must be within 0 and 1")
        self._folder = folder
        self._split: Split = split
        self._rate, self._seed = rate, seed
        self._marks = np.zeros(NUM_MARKS, np.int64)
        self._is_inside = np.zeros(0, np.bool_)
        self._num_head = 0 if folder.manifest.begin_of_text is None else 1
        if rate > 0.0:
            self._prepare()

    def _prepare(self) -> None:
        fim = self._folder.fim
        if fim is None:
            raise UserError(
                f"{self._folder.path}: the tokenizer has no tokens for infilling such as"
                " <|fim_prefix|>; set fim_rate to 0 or build the folder with another tokenizer"
            )
        if self._folder.has_mask(self._split):
            raise UserError(
                f"{self._folder.path}: holds chats, which cannot be rearranged; set fim_rate to 0"
            )
        self._marks[:] = fim.prefix, fim.suffix, fim.middle
        tokenizer = self._folder.tokenizer()
        first_bytes = (tokenizer.id_to_bytes(id)[:1] for id in range(self._folder.vocab_size))
        self._is_inside = np.array([b"\x80" <= byte <= b"\xbf" for byte in first_bytes])

    def chosen(
        self, documents: Integer[np.ndarray, " n"], lengths: Integer[np.ndarray, " n"], epoch: int
    ) -> Bool[np.ndarray, " n"]:
        """Which of `documents`, with these lengths in the folder, are rearranged in `epoch`."""
        if self._rate == 0.0:
            return np.zeros(len(documents), np.bool_)
        draws = uniform(documents, self._seed, epoch, CHOICE)
        return (lengths >= MIN_TOKENS) & (draws < self._rate)

    def positions(
        self,
        document: int,
        start: int,
        length: int,
        epoch: int,
        inside: Int64[np.ndarray, " n"],
    ) -> Int64[np.ndarray, " n"]:
        """Where tokens `inside` (counted from its start) of the rearranged `document` come from:
        positions in the split, or -1, -2, -3 for the three marks. The plain document takes up
        `length` positions from `start` on.
        """
        head, body = self._num_head, length - self._num_head - 1
        text = start + head
        first, second = self._cuts(document, text, body, epoch)
        sizes = [head, 1, first, 1, body - second, 1, second - first, 1]
        origins = [start, -1, text, -2, text + second, -3, text + first, text + body]
        ends = np.cumsum(sizes)
        piece = np.searchsorted(ends, inside, side="right")
        return np.array(origins)[piece] + inside - (ends - sizes)[piece]

    def tokens(self, positions: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """The ids at `positions` of the split, marks among them."""
        if self._rate == 0.0:
            return self._folder.tokens(self._split, positions)
        ids = self._folder.tokens(self._split, np.maximum(positions, 0))
        marks = positions < 0
        ids[marks] = self._marks[-1 - positions[marks]]
        return ids

    def _cuts(self, document: int, start: int, body: int, epoch: int) -> tuple[int, int]:
        """Where the middle begins and ends, counted in tokens from the body's start."""
        place = np.array([document])
        draws = [uniform(place, self._seed, epoch, key)[0] for key in (FIRST_CUT, SECOND_CUT)]
        first, second = (self._between_characters(start, int(draw * body), body) for draw in draws)
        return min(first, second), max(first, second)

    def _between_characters(self, start: int, cut: int, body: int) -> int:
        """`cut`, or the next place after it where a character begins."""
        last = min(cut + MAX_INSIDE, body)
        ids = self._folder.tokens(self._split, np.arange(start + cut, start + last))
        outside = np.flatnonzero(~self._is_inside[ids])
        return cut + int(outside[0]) if len(outside) else last
