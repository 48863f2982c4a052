"""A longer saved state of llama.cpp out of a short one: its cells and rows repeated.

So a cache of many thousand tokens is filled in seconds. The layout is the one llama.cpp writes for
one sequence of a model whose cache has keys only (the absorbed form of MLA); every other layout is
noticed and answered with None.
"""

import struct

HEAD = struct.Struct("<IiII")
"""Magic, sequence, number of streams, number of cells."""
CELL = struct.Struct("<iIi")
"""Position, number of sequences, sequence."""
DATA = struct.Struct("<II")
"""Whether values are transposed, number of layers."""
LAYER = struct.Struct("<iQ")
"""Type of the keys, bytes of a row."""


def extended(state: bytes, cells: int) -> bytearray | None:
    """`state` with `cells` cells at positions 0, 1, ...; None for a layout that is not known."""
    rows = _rows(state)
    if rows is None:
        return None
    magic, sequence, streams, found = HEAD.unpack_from(state)
    longer = bytearray(HEAD.pack(magic, sequence, streams, cells))
    for position in range(cells):
        longer += CELL.pack(position, 1, sequence)
    start = HEAD.size + found * CELL.size
    longer += state[start : start + DATA.size]
    for head, block in rows:
        size = len(block) // found
        longer += head + (block * (-(-cells // found)))[: cells * size]
    return longer


def _rows(state: bytes) -> list[tuple[bytes, bytes]] | None:
    """Each layer's head and rows, if `state` is exactly what is expected."""
    try:
        _, sequence, streams, found = HEAD.unpack_from(state)
        place = HEAD.size
        for position in range(found):
            if CELL.unpack_from(state, place) != (position, 1, sequence):
                return None
            place += CELL.size
        _, layers = DATA.unpack_from(state, place)
        place += DATA.size
        rows = []
        for _ in range(layers):
            _, row_bytes = LAYER.unpack_from(state, place)
            end = place + LAYER.size + found * row_bytes
            rows.append((state[place : place + LAYER.size], state[place + LAYER.size : end]))
            place = end
    except struct.error:
        return None
    return rows if streams == 1 and found > 0 and place == len(state) else None
