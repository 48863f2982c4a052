"""Extend a saved state of llama.cpp: repeat its cells and KV cache entries up to a given length.

This fills a cache of many thousand tokens in seconds. Supports the layout that llama.cpp writes for
one sequence of a model that caches only keys (absorbed MLA).
"""

import struct

HEAD = struct.Struct("<IiII")
"""Magic, sequence, number of streams, number of cells."""
CELL = struct.Struct("<iIi")
"""Position, number of sequences, sequence."""
DATA = struct.Struct("<II")
"""Whether values are transposed, number of layers."""
LAYER = struct.Struct("<iQ")
"""Type of the keys, bytes of an entry."""


def extend_state(state: bytes, cells: int) -> bytearray | None:
    """`state` with `cells` cells at positions 0, 1, ...; None for an unknown layout."""
    layers = _layers(state)
    if layers is None:
        return None
    magic, sequence, streams, found = HEAD.unpack_from(state)
    extended = bytearray(HEAD.pack(magic, sequence, streams, cells))
    for position in range(cells):
        extended += CELL.pack(position, 1, sequence)
    start = HEAD.size + found * CELL.size
    extended += state[start : start + DATA.size]
    for head, entries in layers:
        size = len(entries) // found
        extended += head + (entries * (-(-cells // found)))[: cells * size]
    return extended


def _layers(state: bytes) -> list[tuple[bytes, bytes]] | None:
    """Head and entries of each layer, if `state` has exactly the expected layout."""
    try:
        _, sequence, streams, found = HEAD.unpack_from(state)
        offset = HEAD.size
        for position in range(found):
            if CELL.unpack_from(state, offset) != (position, 1, sequence):
                return None
            offset += CELL.size
        _, count = DATA.unpack_from(state, offset)
        offset += DATA.size
        layers = []
        for _ in range(count):
            _, entry_bytes = LAYER.unpack_from(state, offset)
            end = offset + LAYER.size + found * entry_bytes
            layers.append((state[offset : offset + LAYER.size], state[offset + LAYER.size : end]))
            offset = end
    except struct.error:
        return None
    return layers if streams == 1 and found > 0 and offset == len(state) else None
