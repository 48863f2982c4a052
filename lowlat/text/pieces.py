"""Encode long texts in pieces with bounded memory; cuts change no token."""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

import numpy as np
from jaxtyping import Int32

from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

PIECE = 1 << 18
"""Minimum number of characters of a piece."""
PROMPT_PIECE = 1 << 16
"""The same for prompts of a server: encoding takes up to 500 bytes per token."""
LINE_BREAK = re.compile(r"\S\r?\n(?=\S)")
"""Where a cut changes no token: no pattern of `text.pretokenizers` matches across it."""
BLANK = re.compile(r"\S(?= \S)")
"""Another such place, for texts whose lines begin or end with blanks: before a single blank."""


def text_pieces(texts: Iterable[str], size: int | None = None) -> Iterator[str]:
    """The concatenation of `texts` in pieces; the cuts do not depend on the cuts of `texts`.

    A piece ends at the first line break between two visible characters after `size` (by default
    PIECE) characters, else before the first blank between two of them, else after 2 `size`
    characters. The last 2 `size` characters are cut at such a line break only.
    """
    size = size or PIECE
    buffer, at = "", 0
    for text in texts:
        buffer, at = buffer[at:] + text, 0
        while len(buffer) - at > 2 * size:
            near = at + size, at + 2 * size + 1
            match = LINE_BREAK.search(buffer, *near) or BLANK.search(buffer, *near)
            end = at + 2 * size if match is None else match.end()
            yield buffer[at:end]
            at = end
    match = LINE_BREAK.search(buffer, at + size)
    end = len(buffer) if match is None else match.end()
    yield from filter(None, (buffer[at:end], buffer[end:]))


def encode_long(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " tokens"]:
    """The ids of `tokenizer.encode(text)`, with bounded memory besides them.

    If half a million characters have neither line break nor blank, a cut may change a token.
    """
    before, after = _around(tokenizer)
    pieces = text_pieces([text]) if _can_cut(tokenizer) else [text]
    parts = (tokenizer.encode(piece, add_special_tokens=False) for piece in pieces)
    return _joined(chain([before], parts, [after]))


def encode_plain(tokenizer: Tokenizer, text: str) -> Int32[np.ndarray, " tokens"]:
    """The ids of `tokenizer.encode_batch([text])`, with bounded memory besides them."""
    pieces = text_pieces([text]) if _can_cut(tokenizer, parse_special=False) else [text]
    return _joined(tokenizer.encode_batch([piece])[0] for piece in pieces)


class TooManyTokens(UserError):
    """A text has more tokens than it may have."""


def encode_prompt_text(
    tokenizer: Tokenizer,
    text: str,
    most: int,
    *,
    add_special_tokens: bool = True,
    parse_special: bool = True,
) -> list[int]:
    """The ids of `tokenizer.encode`, with bounded memory and without the interpreter's lock.

    Raises TooManyTokens for a long text of more than `most` tokens, mostly before all of it is
    encoded. If 128 Ki characters have neither line break nor blank, a cut may change a token.
    """
    options = {"add_special_tokens": add_special_tokens, "parse_special": parse_special}
    if len(text) <= 2 * PROMPT_PIECE:
        return tokenizer.encode(text, **options)
    pieces = text_pieces([text], PROMPT_PIECE)
    is_cut = _can_cut(tokenizer, parse_special=parse_special)
    # Where cuts add tokens, the pieces only decide whether the whole text is encoded.
    limit = most if is_cut else most + most // 16
    before, after = _around(tokenizer) if add_special_tokens else ([], [])
    ids = before
    for piece in pieces:
        ids += tokenizer.encode(piece, add_special_tokens=False, parse_special=parse_special)
        if len(ids) + len(after) > limit:
            raise TooManyTokens(f"the text has more than {most} tokens; shorten it")
    if is_cut:
        return ids + after
    return tokenizer.encode(text, **options)


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a text."""
    probe = "a"
    whole, bare = tokenizer.encode(probe), tokenizer.encode(probe, add_special_tokens=False)
    before = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:before], whole[before + len(bare) :]


def _can_cut(tokenizer: Tokenizer, *, parse_special: bool = True) -> bool:
    """Whether cuts change no token: the tokenizer puts nothing before each text, and no added token
    that is matched has a blank or takes those around it."""
    whole, head, rest = (
        tokenizer.encode(probe, add_special_tokens=False) for probe in ("a\na", "a\n", "a")
    )
    takes_blanks = parse_special and tokenizer.has_blanks_in_added_tokens
    return whole == head + rest and not takes_blanks


def _joined(parts: Iterable[list[int]]) -> Int32[np.ndarray, " tokens"]:
    return np.concatenate([np.empty(0, np.int32), *(np.array(ids, np.int32) for ids in parts)])
