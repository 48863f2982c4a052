"""Rows of whole chats: no answer without its question, every chat once an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowlat.data.dataset import TokenizedDataset
from lowlat.data.packing import PackedChats, TruncatedChats, packed
from lowlat.utils.errors import UserError

from .conftest import END, PACKING, Make, assert_found_by_number, texts

T, AHEAD = 61, 3
QUESTION = 5
"""Tokens of a chat that are no targets."""


def rows(folder: TokenizedDataset, **changes: object) -> PackedChats:
    options = PACKING | {"sequence_length": T, "num_ahead": AHEAD, "document_masks": True}
    return PackedChats(folder, **(options | changes))  # pyright: ignore[reportArgumentType]


def chats(make_folder: Make, documents: list[list[int]]) -> TokenizedDataset:
    masks = [[place >= QUESTION for place in range(len(document))] for document in documents]
    return make_folder(documents, masks=masks)


@pytest.mark.parametrize("document_masks", [False, True])
@pytest.mark.parametrize("epoch", [0, 1])
def test_every_chat_is_whole_in_one_row(
    make_folder: Make, epoch: int, document_masks: bool
) -> None:
    """Regression: the rest of a chat alone in the next row, where its answer is learned without the
    question.
    """
    documents = texts(83, longest=40)
    used = rows(chats(make_folder, documents), document_masks=document_masks)
    batch = used.batch(epoch * used.per_epoch, used.per_epoch)
    assert batch.tokens.shape == (used.per_epoch, T + AHEAD)
    found, targets = [], 0
    for tokens, loss_mask in zip(batch.tokens.tolist(), batch.loss_mask.tolist(), strict=True):
        assert not any(loss_mask[T + 1 :])
        while tokens[0] != END:
            size = tokens.index(END)
            assert loss_mask[: size + 1] == [QUESTION <= place < size for place in range(size + 1)]
            found.append(tokens[:size])
            targets += sum(loss_mask[: size + 1])
            tokens, loss_mask = tokens[size + 1 :], loss_mask[size + 1 :]
        assert set(tokens) <= {END} and not any(loss_mask)
    assert sorted(found) == sorted(documents)
    assert targets == sum(len(document) - QUESTION for document in documents if len(document) > 5)
    assert used.truncated == TruncatedChats(chats=0, tokens=0, longest=max(map(len, documents)) + 1)


def test_masks_distinguish_chats_and_padding(make_folder: Make) -> None:
    documents = texts(41, longest=30)
    used = rows(chats(make_folder, documents))
    batch = used.batch(0, used.per_epoch)
    assert batch.documents is not None
    for tokens, lengths in zip(batch.tokens.tolist(), batch.documents, strict=True):
        assert sum(lengths) == T and min(lengths) > 0
        ends = [
            place + 1 for place in range(T) if tokens[place] == END and tokens[place - 1] != END
        ]
        assert np.cumsum(lengths).tolist()[: len(ends)] == ends
        assert len(lengths) <= len(ends) + 1


def test_a_chat_may_end_with_the_last_target(make_folder: Make) -> None:
    whole = [7] * T
    used = rows(chats(make_folder, [whole]))
    batch = used.batch(0, 1)
    assert used.per_epoch == 1 and used.truncated.chats == 0
    assert batch.tokens[0].tolist() == [*whole, END, END, END]
    assert batch.documents == ((T,),)


def test_the_rest_of_a_chat_longer_than_a_row_is_left_out(make_folder: Make) -> None:
    """It is counted, and nothing of it is in any row."""
    documents = [[1] * 20, [*[2] * 70, *[3] * 30], [4] * 61, [5] * 62]
    used = rows(chats(make_folder, documents))
    assert used.truncated == TruncatedChats(chats=2, tokens=101 - 62 + 63 - 62, longest=101)
    found = used.batch(0, used.per_epoch).tokens
    assert used.per_epoch == 4 and not bool((found == 3).any())
    assert int((found == 2).sum()) == int((found == 5).sum()) == 62


def test_a_row_depends_on_its_number_alone(make_folder: Make) -> None:
    """Regression: a resumed run, or another layout of processes, that reads other tokens."""
    folder = chats(make_folder, texts(53, longest=40))
    ahead, behind = rows(folder), rows(folder)
    assert_found_by_number(ahead, behind)


def test_epochs_and_seeds_have_orders_of_their_own(make_folder: Make) -> None:
    folder = chats(make_folder, texts(53, longest=40))
    one, other = rows(folder), rows(folder, seed=12)
    size = one.per_epoch
    first, second = (one.batch(epoch * size, size).tokens.tolist() for epoch in (0, 1))
    assert first != second and sorted(first) == sorted(second)
    assert sorted(other.batch(0, other.per_epoch).tokens.tolist()) != sorted(first)


def test_chats_are_not_rearranged(make_folder: Make) -> None:
    with pytest.raises(UserError, match="has chats, which cannot be rearranged"):
        rows(chats(make_folder, texts(9)), fim_rate=0.1)


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(50, 60))
def test_packing(sizes: list[int], room: int) -> None:
    """No row holds more than it can, and none but perhaps one is half empty."""
    found = packed(np.array(sizes), room)
    used = np.bincount(found, weights=sizes)
    assert len(used) == found.max() + 1 and used.min() > 0
    assert used.max() <= room and (used <= room / 2).sum() <= 1


def test_packing_wastes_little() -> None:
    """Chats of 80 to 280 tokens in rows of 512."""
    sizes = np.random.default_rng(0).integers(80, 280, 4000)
    count = packed(sizes, 513).max() + 1
    assert sizes.sum() / (count * 513) > 0.93
