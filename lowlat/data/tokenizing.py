"""Batch tokenization of documents, in order, with begin and end tokens.

`chat` encodes chats, `writer` writes files.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lowlat.data.chat import ChatEncoder
from lowlat.data.documents import (
    BadDocument,
    ChatDocument,
    Document,
    Invalid,
    TextDocument,
)
from lowlat.data.manifest import Split
from lowlat.data.selection import INVALID
from lowlat.data.vocabulary import begin_of_text
from lowlat.data.writer import SplitWriter
from lowlat.text.pieces import PIECE
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Task

BATCH = 1 << 22
"""Characters per tokenizer batch, which its threads share."""


HEAD_PROBE = "a\n"
"""Text that no tokenizer merges with a copy of itself."""
LEADS = ("\n", ".", "a", "0", "\u4e00")
"""Texts to put before a piece so that the tokenizer encodes its head as inside a document.

The first is a line break, where documents are cut into pieces; the others are for pieces whose head
would merge with a line break.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """A piece of a document in the tokenizer's queue."""

    split: Split
    text: str
    begins: bool
    """Whether it is the first piece of its document."""
    ends: int | None
    """For the last piece of a document, the bytes of the document; else None."""


class BatchTokenizer:
    """Tokenizes documents in batches and writes them in order."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        writers: Mapping[Split, SplitWriter],
        end: int,
        task: Task,
        invalid: Invalid,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        """Number of dropped documents by reason."""
        self._tokenizer, self._writers, self._task = tokenizer, writers, task
        self._chats = ChatEncoder(tokenizer)
        self._invalid = invalid
        begin = begin_of_text(tokenizer)
        self._begin, self._end = [] if begin is None else [begin], [end]
        self._waiting: list[_Piece] = []
        self._size = 0

    def add(self, document: Document, split: Split, size: int) -> None:
        """Queue `document`, of `size` bytes of text."""
        if isinstance(document, ChatDocument):
            self._add_chat(document, split)
        else:
            self._add_text(document, split, size)

    def flush(self) -> None:
        """Tokenize and write all queued pieces."""
        pieces, self._waiting, self._size = self._waiting, [], 0
        for piece, ids in zip(pieces, self._encoded(pieces), strict=True):
            writer = self._writers[piece.split]
            head, tail = self._begin * piece.begins, self._end * (piece.ends is not None)
            writer.add(np.array([*head, *ids, *tail], np.int64))
            if piece.ends is not None:
                writer.end_document(piece.ends)

    def _encoded(self, pieces: list[_Piece]) -> list[list[int]]:
        """Ids of every piece, as encoded within its document."""
        apart = any(not piece.begins for piece in pieces) and self._marks_heads
        before = [LEADS[0] if apart and not piece.begins else "" for piece in pieces]
        texts = [head + piece.text for head, piece in zip(before, pieces, strict=True)]
        found = self._tokenizer.encode_batch(texts)
        for index, (head, piece) in enumerate(zip(before, pieces, strict=True)):
            if head:
                ids = _without_lead(self._tokenizer, head, found[index])
                found[index] = self._continued(piece.text) if ids is None else ids
        return found

    @cached_property
    def _marks_heads(self) -> bool:
        """Whether the tokenizer encodes the head of a text differently than the same text inside
        one: SentencePiece adds a blank.
        """
        texts = [HEAD_PROBE * 2, HEAD_PROBE, HEAD_PROBE]
        whole, first, second = self._tokenizer.encode_batch(texts)
        return whole != first + second

    def _continued(self, text: str) -> list[int]:
        """Ids of `text` inside a document. Raises UserError if it merges with all LEADS."""
        for lead in LEADS[1:]:
            (whole,) = self._tokenizer.encode_batch([lead + text])
            ids = _without_lead(self._tokenizer, lead, whole)
            if ids is not None:
                return ids
        raise UserError(
            f"a document is longer than {PIECE} characters, and this tokenizer merges across any "
            "cut; split it into documents with --separator, or use another --tokenizer"
        )

    def _add_text(self, document: TextDocument, split: Split, size: int) -> None:
        reported = 0
        begins = True
        for text, is_last in _with_last(document.pieces()):
            ends = size if is_last else None
            self._waiting.append(_Piece(split=split, text=text, begins=begins, ends=ends))
            begins = False
            self._size += len(text)
            if self._size >= BATCH:
                self.flush()
            done = document.source_bytes if is_last else min(reported + len(text), size)
            self._task.advance(done - reported)
            reported = done

    def _add_chat(self, chat: ChatDocument, split: Split) -> None:
        self.flush()
        try:
            ids, loss_mask, size = self._chats.encode(chat)
        except BadDocument:
            if self._invalid != "skip":
                raise
            self.dropped[INVALID] += 1
            return
        if ids[-1:].tolist() != self._end:
            ids, loss_mask = np.append(ids, self._end), np.append(loss_mask, False)
        self._writers[split].add(ids, loss_mask)
        self._writers[split].end_document(size)
        self._task.advance(chat.source_bytes)


def _without_lead(tokenizer: Tokenizer, lead: str, ids: list[int]) -> list[int] | None:
    """`ids` of `lead` plus a text, without the ids of `lead`; None if the two merge."""
    (own,) = tokenizer.encode_batch([lead])
    return ids[len(own) :] if ids[: len(own)] == own else None


def _with_last(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each text with whether it is the last."""
    waiting: str | None = None
    for text in texts:
        if waiting is not None:
            yield waiting, False
        waiting = text
    if waiting is not None:
        yield waiting, True
