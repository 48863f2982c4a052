"""PackedSequences: every token once an epoch, found by number alone, with documents told apart."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from lowlat.data.dataset import TokenizedDataset
from lowlat.data.packing import PackedSequences
from lowlat.utils.errors import UserError

from .conftest import END, PACKING, Make, assert_found_by_number, texts

T, AHEAD = 37, 3


def windows(folder: TokenizedDataset, **changes: object) -> PackedSequences:
    options = PACKING | {"sequence_length": T, "num_ahead": AHEAD, "document_masks": False}
    return PackedSequences(folder, **(options | changes))  # pyright: ignore[reportArgumentType]


def stream(folder: TokenizedDataset, epoch: int = 0, **changes: object) -> list[int]:
    """The tokens of an epoch: of its one window, where it is as long as all documents."""
    length = folder.num_tokens("train") - 1
    used = windows(folder, sequence_length=length, num_ahead=1, **changes)
    assert used.per_epoch == 1
    return used.batch(epoch, 1).tokens[0].tolist()


def cut(tokens: Sequence[int]) -> list[tuple[int, ...]]:
    """The whole documents in `tokens`, without their end tokens."""
    found, document = [], []
    for token in tokens:
        if token == END:
            found.append(tuple(document))
            document = []
        else:
            document.append(token)
    return found


def test_an_epoch_is_all_documents_shuffled_and_joined(make_folder: Make) -> None:
    documents = texts(53)
    tokens = stream(make_folder(documents))
    assert len(tokens) == sum(len(document) + 1 for document in documents)
    found = cut(tokens)
    assert found != [tuple(document) for document in documents]
    assert sorted(found) == sorted(tuple(document) for document in documents)


@pytest.mark.parametrize("fim_rate", [0.0, 0.7])
@pytest.mark.parametrize("epoch", [0, 1])
def test_windows_cut_the_stream(make_folder: Make, epoch: int, fim_rate: float) -> None:
    """Every token of an epoch is a target once, but for the first and what fills no window."""
    folder = make_folder(texts(53))
    tokens = stream(folder, epoch, fim_rate=fim_rate)
    used = windows(folder, fim_rate=fim_rate)
    assert used.per_epoch == (folder.num_tokens("train") - AHEAD) // T
    rows = used.batch(epoch * used.per_epoch, used.per_epoch).tokens.tolist()
    expected = [tokens[first * T : (first + 1) * T + AHEAD] for first in range(used.per_epoch)]
    assert rows != expected
    assert sorted(rows) == sorted(expected)


def test_epochs_and_seeds_have_orders_of_their_own(make_folder: Make) -> None:
    folder = make_folder(texts(53))
    orders = [cut(stream(folder, epoch, seed=seed)) for epoch, seed in ((0, 1), (1, 1), (0, 2))]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])


@pytest.mark.parametrize("fim_rate", [0.0, 0.7])
def test_a_window_depends_on_its_number_alone(make_folder: Make, fim_rate: float) -> None:
    """Regression: a resumed run, or another layout of processes, that reads other tokens."""
    folder = make_folder(texts(29))
    options = {"document_masks": True, "fim_rate": fim_rate}
    ahead, behind = windows(folder, **options), windows(folder, **options)
    assert_found_by_number(ahead, behind)


def test_windows_are_reshuffled_in_every_epoch(make_folder: Make) -> None:
    """One document, so that the windows' own order alone can differ."""
    folder = make_folder([[place % 251 for place in range(41 * T)]])
    used = windows(folder)
    rows = used.batch(0, 2 * used.per_epoch).tokens.tolist()
    first, second = rows[: used.per_epoch], rows[used.per_epoch :]
    assert first != second and sorted(first) == sorted(second)


def test_shards_change_nothing(make_folder: Make) -> None:
    documents = texts(31)
    one = windows(make_folder(documents, name="one"))
    many = windows(make_folder(documents, name="many", shard_tokens=101))
    assert torch.equal(one.batch(0, 19).tokens, many.batch(0, 19).tokens)


def test_masks_distinguish_documents(make_folder: Make) -> None:
    documents = texts(41, longest=19)
    used = windows(make_folder(documents), document_masks=True)
    batch = used.batch(0, used.per_epoch)
    assert batch.documents is not None
    for row, loss_mask, lengths in zip(
        batch.tokens.tolist(), batch.loss_mask.tolist(), batch.documents, strict=True
    ):
        assert sum(lengths) == T and min(lengths) > 0
        borders = np.cumsum(lengths)[:-1].tolist()
        assert borders == [place + 1 for place in range(T - 1) if row[place] == END]
        firsts = [place for place in range(1, T + AHEAD) if row[place - 1] == END]
        assert [place for place in range(1, T + AHEAD) if not loss_mask[place]] == firsts


def test_without_masks_a_row_is_one_sequence(make_folder: Make) -> None:
    batch = windows(make_folder(texts(13))).batch(0, 3)
    assert batch.documents is None
    assert bool(batch.loss_mask.all())


def test_targets_of_the_folder_are_kept(make_folder: Make) -> None:
    documents = texts(17)
    masks = [[index % 3 == 0 for index in range(len(document))] for document in documents]
    used = windows(make_folder(documents, masks=masks, shard_tokens=83))
    batch = used.batch(0, used.per_epoch)
    expected = {
        (*document[place : place + 5],): masks[number][place]
        for number, document in enumerate(documents)
        for place in range(len(document) - 4)
    }
    seen = 0
    for row, loss_mask in zip(batch.tokens.tolist(), batch.loss_mask.tolist(), strict=True):
        for place in range(len(row) - 4):
            key = (*row[place : place + 5],)
            if key in expected:
                seen += 1
                assert loss_mask[place] == expected[key]
        assert not any(p for token, p in zip(row, loss_mask, strict=True) if token == END)
    assert seen > 300


@pytest.mark.parametrize("rest", [0, 1, 2])
def test_a_model_with_mtp_and_one_without_read_the_same(make_folder: Make, rest: int) -> None:
    """Regression: other windows in another order where documents are a token longer than windows
    without MTP need.
    """
    folder = make_folder([[place % 251 for place in range(9 * T + rest - 1)]])
    one, two = (windows(folder, num_ahead=ahead) for ahead in (1, 2))
    assert one.per_epoch == two.per_epoch
    rows = (used.batch(0, 2 * used.per_epoch).tokens[:, : T + 1] for used in (one, two))
    assert torch.equal(*rows)


def test_splits_are_apart(make_folder: Make) -> None:
    documents = texts(23)
    folder = make_folder(documents[:20], held_out=documents[20:])
    length = folder.num_tokens("held_out") - 1
    used = windows(folder, split="held_out", sequence_length=length, num_ahead=1)
    found = cut(used.batch(0, 1).tokens[0].tolist())
    assert sorted(found) == sorted(tuple(document) for document in documents[20:])


def test_a_split_without_a_window_is_an_error(make_folder: Make) -> None:
    folder = make_folder([[1] * (T + AHEAD - 2)], held_out=[[1] * (T + AHEAD - 1)])
    with pytest.raises(UserError, match=r"tokens: train has 39 tokens, fewer than the 40"):
        windows(folder)
    assert windows(folder, split="held_out").per_epoch == 1
