"""What of a window is input, and batches in parts."""

import torch

from lowlat.attention.flash import FlashAttention

from . import tiny


def test_lengths() -> None:
    plain, masked = tiny.batch(), tiny.batch(masked=True)
    assert plain.rows == tiny.ROWS and plain.sequence_length(3) == tiny.LENGTH
    assert plain.lengths(3) == [tiny.LENGTH] * tiny.ROWS
    assert masked.lengths(3) == [1, 6, 2, 5, 3, 4, 4, 3, 5, 2]


def test_parts() -> None:
    """In order, none lost, each with its own documents; the last may be smaller."""
    batch = tiny.batch(masked=True)
    parts = list(batch.split(2))
    assert [part.rows for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.tokens for part in parts]), batch.tokens)
    assert torch.equal(torch.cat([part.loss_mask for part in parts]), batch.loss_mask)
    assert batch.documents is not None
    assert [part.documents for part in parts] == [
        batch.documents[:2],
        batch.documents[2:4],
        batch.documents[4:],
    ]
    assert all(part.documents is None for part in tiny.batch().split(3))
    assert len(list(batch.split(99))) == 1


def test_every_sequence_begins_at_position_zero() -> None:
    positions = FlashAttention(tiny.batch(rows=2, masked=True).lengths(3)).positions()
    assert positions.tolist() == [0, 0, 1, 2, 3, 4, 5, 0, 1, 0, 1, 2, 3, 4]


def test_to_a_device() -> None:
    batch = tiny.batch(masked=True)
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens) and moved.documents == batch.documents
