"""Long texts in pieces, cut where no token changes, so that encoding one takes little memory."""

import re
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int32

from lowlat.text.tokenizer import Tokenizer

PIECE = 1 << 18
"""Characters from which on a text is cut for the tokenizer."""
LINE_BREAK = re.compile(r"\S\r?\n(?=\S)")
"""Where a cut changes no token: no pattern of pretokenizers.py reaches over such a line break."""
BLANK = re.compile(r"\S(?= \S)")
"""Another such place, for texts whose lines begin or end with blanks: before a blank of its own."""


def text_pieces(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, which follow one another, cut anew: where does not depend on how they came.

    A piece ends at the first line break between two visible characters after PIECE characters, else
    before the first blank between two of them, or after twice as many where there is none.
    """
    buffer = ""
    for text in texts:
        buffer += text
        while len(buffer) > 2 * PIECE:
            near = PIECE, 2 * PIECE + 1
            match = LINE_BREAK.search(buffer, *near) or BLANK.search(buffer, *near)
            end = 2 * PIECE if match is None else match.end()
            yield buffer[:end]
            buffer = buffer[end:]
    if buffer:
        yield from _last_pieces(buffer)


def _last_pieces(buffer: str) -> Iterator[str]:
    """The end of a text, of at most 2 * PIECE characters, by the same rule."""
    match = LINE_BREAK.search(buffer, PIECE)
    end = len(buffer) if match is None else match.end()
    yield buffer[:end]
    if buffer[end:]:
        yield buffer[end:]


def encode_long(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " tokens"]:
    """The ids of `text` as `tokenizer.encode` gives them, in little memory beside them: a tokenizer
    that puts a blank before each text puts one at every cut, a quarter of a million characters
    apart.
    """
    return _joined(
        tokenizer.encode(piece, add_special_tokens=number == 0)
        for number, piece in enumerate(text_pieces([text]))
    )


def encode_plain(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " tokens"]:
    """The ids of `text` as `tokenizer.encode_batch` gives them, in the way of `encode_long`."""
    return _joined(tokenizer.encode_batch([piece])[0] for piece in text_pieces([text]))


def _joined(parts: Iterable[list[int]]) -> Int32[np.ndarray, " tokens"]:
    return np.concatenate([np.empty(0, np.int32), *(np.array(ids, np.int32) for ids in parts)])
