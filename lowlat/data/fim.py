"""Fill-in-the-middle (FIM): a share of documents is rearranged as prefix, suffix, middle (arXiv
2207.14255; DeepSeek-V3 section 4.1).

    begin <prefix> first <suffix> last <middle> between end

Cuts are between tokens, so the tokens are those of the plain text. No cut is inside a character: a
token that starts with a continuation byte stays with the token before it.
"""

import numpy as np
from jaxtyping import Bool, Int64, Integer

from lowlat.data.dataset import TokenizedDataset
from lowlat.data.manifest import Split
from lowlat.data.shuffle import uniform
from lowlat.utils.errors import UserError

MIN_TOKENS = 32
"""Shorter documents are not rearranged."""
NUM_MARKS = 3
CHOICE, FIRST_CUT, SECOND_CUT = 101, 102, 103
MAX_INSIDE = 3
"""A character has at most four bytes, so at most three tokens begin inside it."""


class FillInTheMiddle:
    """Random choice and rearrangement of documents of one split, different in every epoch."""

    def __init__(self, folder: TokenizedDataset, split: Split, *, rate: float, seed: int) -> None:
        """`rate` is the share of rearranged documents. Raises UserError for a rate outside 0..1, a
        tokenizer without FIM tokens, and chats.
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
        fim = self._folder.manifest.fim
        if fim is None:
            raise UserError(
                f"{self._folder.path}: the tokenizer has no fill-in-the-middle tokens such as"
                " <|fim_prefix|>; set fim_rate to 0 or build the folder with another tokenizer"
            )
        if self._folder.has_mask(self._split):
            raise UserError(
                f"{self._folder.path}: has chats, which cannot be rearranged; set fim_rate to 0"
            )
        self._marks[:] = fim.prefix, fim.suffix, fim.middle
        tokenizer = self._folder.tokenizer()
        first_bytes = (tokenizer.id_to_bytes(id)[:1] for id in range(self._folder.vocab_size))
        self._is_inside = np.array([b"\x80" <= byte <= b"\xbf" for byte in first_bytes])

    def chosen(
        self, documents: Integer[np.ndarray, " n"], lengths: Integer[np.ndarray, " n"], epoch: int
    ) -> Bool[np.ndarray, " n"]:
        """Whether each of `documents`, of the given `lengths`, is rearranged in `epoch`."""
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
        """Positions in the split of the tokens at offsets `inside` of the rearranged `document`;
        -1, -2, -3 for the three FIM tokens.

        The plain document has `length` tokens from position `start`.
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
        """Ids at `positions` of the split; negative positions are FIM tokens."""
        if self._rate == 0.0:
            return self._folder.tokens(self._split, positions)
        ids = self._folder.tokens(self._split, np.maximum(positions, 0))
        marks = positions < 0
        ids[marks] = self._marks[-1 - positions[marks]]
        return ids

    def _cuts(self, document: int, start: int, body: int, epoch: int) -> tuple[int, int]:
        """Begin and end of the middle, in tokens from the start of the body."""
        place = np.array([document])
        draws = [uniform(place, self._seed, epoch, key)[0] for key in (FIRST_CUT, SECOND_CUT)]
        first, second = (self._between_characters(start, int(draw * body), body) for draw in draws)
        return min(first, second), max(first, second)

    def _between_characters(self, start: int, cut: int, body: int) -> int:
        """`cut`, or the next position after it at which a character begins."""
        last = min(cut + MAX_INSIDE, body)
        ids = self._folder.tokens(self._split, np.arange(start + cut, start + last))
        outside = np.flatnonzero(~self._is_inside[ids])
        return cut + int(outside[0]) if len(outside) else last
