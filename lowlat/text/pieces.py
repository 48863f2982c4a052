"""Encode long texts in pieces with bounded memory; cuts change no token."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from jaxtyping import Int32

from lowlat.text.tokenizer import Tokenizer

PIECE = 1 << 18
"""Minimum number of characters of a piece."""
LINE_BREAK = re.compile(r"\S\r?\n(?=\S)")
"""Where a cut changes no token: no pattern of `text.pretokenizers` matches across it."""
BLANK = re.compile(r"\S(?= \S)")
"""Another such place, for texts whose lines begin or end with blanks: before a single blank."""


def text_pieces(texts: Iterable[str]) -> Iterator[str]:
    """The concatenation of `texts` in pieces; the cuts do not depend on the cuts of `texts`.

    A piece ends at the first line break between two visible characters after PIECE characters, else
    before the first blank between two of them, else after 2 PIECE characters. The last 2 PIECE
    characters are cut at such a line break only.
    """
    buffer, at = "", 0
    for text in texts:
        buffer, at = buffer[at:] + text, 0
        while len(buffer) - at > 2 * PIECE:
            near = at + PIECE, at + 2 * PIECE + 1
            match = LINE_BREAK.search(buffer, *near) or BLANK.search(buffer, *near)
            end = at + 2 * PIECE if match is None else match.end()
            yield buffer[at:end]
            at = end
    match = LINE_BREAK.search(buffer, at + PIECE)
    end = len(buffer) if match is None else match.end()
    yield from filter(None, (buffer[at:end], buffer[end:]))


def encode_long(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " tokens"]:
    """The ids of `tokenizer.encode(text)`, with bounded memory besides them.

    If half a million characters have neither line break nor blank, a cut may change a token.
    """
    probe = "a"
    whole, bare = tokenizer.encode(probe), tokenizer.encode(probe, add_special_tokens=False)
    before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    around = whole[:before], whole[before + len(bare) :]
    parts = (tokenizer.encode(piece, add_special_tokens=False) for piece in _cut(tokenizer, text))
    return _joined(chain([around[0]], parts, [around[1]]))


def encode_plain(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " tokens"]:
    """The ids of `tokenizer.encode_batch([text])`, with bounded memory besides them."""
    return _joined(tokenizer.encode_batch([piece])[0] for piece in _cut(tokenizer, text))


def _cut(tokenizer: Tokenizer, text: str) -> Iterable[str]:
    """`text` in pieces, or whole if the tokenizer puts something before each text."""
    whole, head, rest = tokenizer.encode_batch(["a\na", "a\n", "a"])
    return text_pieces([text]) if whole == head + rest else [text]


def _joined(parts: Iterable[list[int]]) -> Int32[np.ndarray, " tokens"]:
    return np.concatenate([np.empty(0, np.int32), *(np.array(ids, np.int32) for ids in parts)])
