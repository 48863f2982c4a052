"""Count the JSON values in a body before any object is built: a vectorized scan outside strings.

The count bounds the work and the memory of parsing and validation. `http.body` parses.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, UInt8

CHUNK_BYTES = 1 << 18
"""Bytes per step. numpy's loops are short then, and the interpreter's lock is free in between."""
MIN_BYTES_PER_VALUE = 2
"""A value and its separator."""

_QUOTE, _BACKSLASH, _COMMA, _COLON, _BRACKET = b'"\\,:['
_SPACE = np.isin(np.arange(256), list(b" \t\r\n"))
_STRUCTURE = np.isin(np.arange(256), list(b'{}[],:"'))
_OPENING = np.isin(np.arange(256), list(b'{["'))
_NUMBER = np.isin(np.arange(256), list(b"-0123456789"))


def count_values(text: bytes, *, counts_elements: bool = True) -> int:
    """The values and keys in `text`, up to its first syntax error exactly as a parser sees them.

    Counts every object, array, string, key, literal and number. Without `counts_elements`, numbers
    in arrays do not count, so a list of token ids is one value.
    """
    count, last = 0, _COLON  # The text may begin with a scalar.
    for kept in _outside_strings(text):
        if kept.size:
            before = np.concatenate([np.array([last], np.uint8), kept[:-1]])
            begins = ~_STRUCTURE[kept] & _STRUCTURE[before]
            if not counts_elements:
                is_element = (before == _COMMA) | (before == _BRACKET)
                begins &= ~(_NUMBER[kept] & is_element)
            count += int(np.count_nonzero(begins)) + int(np.count_nonzero(_OPENING[kept]))
            last = int(kept[-1])
    return count


def _outside_strings(text: bytes) -> Iterator[UInt8[np.ndarray, " kept"]]:
    """The bytes of each chunk without white space; of a string only the opening quote."""
    data = np.frombuffer(text, np.uint8)
    is_inside = is_escaped = False
    for start in range(0, len(data), CHUNK_BYTES):
        chunk = data[start : start + CHUNK_BYTES]
        quotes = chunk == _QUOTE
        escaped, is_escaped = _escaped(chunk, first=is_escaped)
        if escaped is not None:
            quotes &= ~escaped
        # An odd number of quotes up to and including a byte: it is inside a string, or opens one.
        inside = np.cumsum(quotes, dtype=np.uint8) % 2 == (0 if is_inside else 1)
        keeps = np.where(quotes, inside, ~inside) & ~_SPACE[chunk]
        is_inside = bool(inside[-1])
        yield chunk[keeps]


def _escaped(
    chunk: UInt8[np.ndarray, " bytes"], *, first: bool
) -> tuple[Bool[np.ndarray, " bytes"] | None, bool]:
    """Which bytes follow an escaping backslash (None: none), and whether the next chunk's first
    does; `first`: whether this chunk's first does.
    """
    at = np.flatnonzero(chunk == _BACKSLASH)
    if not at.size and not first:
        return None, False
    escaped = np.zeros(len(chunk) + 1, bool)
    escaped[0] = first
    if at.size:
        begins_run = np.diff(at, prepend=-2) != 1
        run = np.maximum.accumulate(np.where(begins_run, at, 0))
        # In a run of backslashes every second one escapes what follows, from the first one on.
        offset = at - run + ((run == 0) & first)
        escaped[at[offset % 2 == 0] + 1] = True
    return escaped[:-1], bool(escaped[-1])
