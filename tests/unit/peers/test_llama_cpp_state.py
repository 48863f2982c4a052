"""Saved states of llama.cpp made longer."""

import struct

import pytest

from lowlat.peers.llama_cpp_state import extend_state


def state(cells: int, *, layers: int = 2, row: int = 3, tail: bytes = b"") -> bytes:
    """A state of `cells` cells; byte b of row r of layer l is 50 l + r."""
    head = struct.pack("<IiII", 0xABCD, 0, 1, cells)
    meta = b"".join(struct.pack("<iIi", position, 1, 0) for position in range(cells))
    data = struct.pack("<II", 0, layers)
    for layer in range(layers):
        data += struct.pack("<iQ", 1, row)
        data += b"".join(bytes([50 * layer + r % 4]) * row for r in range(cells))
    return head + meta + data + tail


@pytest.mark.parametrize("cells", [1, 4, 5, 11])
def test_a_longer_state_is_what_would_have_been_saved(cells: int) -> None:
    assert extend_state(state(4), cells) == state(cells)


@pytest.mark.parametrize(
    "unknown",
    [
        b"",
        state(4)[:-1],
        state(4, tail=b"values"),
        state(0),
        struct.pack("<IiII", 0xABCD, 0, 2, 4) + state(4)[16:],
        state(4)[:16] + struct.pack("<iIi", 5, 1, 0) + state(4)[28:],
    ],
)
def test_other_layouts_are_noticed(unknown: bytes) -> None:
    assert extend_state(unknown, 8) is None
