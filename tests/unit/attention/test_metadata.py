"""Layout of one step, worked out by hand."""

import pytest

from lowlat.attention.metadata import AttentionBatch, SequenceSlice


def test_positions_and_slots_by_hand() -> None:
    first = SequenceSlice(pages=(5, 2, 7), start=4, length=3)
    second = SequenceSlice(pages=(0,), start=0, length=2)
    batch = AttentionBatch.build([first, second], page_size=3)
    assert batch.positions.tolist() == [4, 5, 6, 0, 1]
    # 4 is the second row of page 2, 5 its third, 6 the first of page 7
    assert batch.slots.tolist() == [7, 8, 21, 0, 1]
    assert first.context == 7 and second.context == 2
    assert batch.sequences == (first, second)


def test_pages_of_one_token() -> None:
    batch = AttentionBatch.build([SequenceSlice(pages=(4, 1, 9), start=1, length=2)], page_size=1)
    assert batch.slots.tolist() == [1, 9]


@pytest.mark.parametrize(
    "bad",
    [
        SequenceSlice(pages=(0, 1), start=5, length=2),
        SequenceSlice(pages=(0,), start=0, length=0),
    ],
)
def test_uncovered_or_empty_sequences_are_refused(bad: SequenceSlice) -> None:
    with pytest.raises(AssertionError):
        AttentionBatch.build([bad], page_size=3)
