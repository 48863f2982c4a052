"""Finding an evaluation text in training data, by hash and by hand."""

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowlat.data import overlap
from lowlat.data.overlap import require_unseen, shared_runs
from lowlat.utils.errors import UserError

from .conftest import Make, texts


def by_hand(train: list[int], ids: list[int], length: int) -> float:
    """Runs as tuples."""

    def runs(tokens: list[int]) -> set[tuple[int, ...]]:
        return {tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)}

    wanted = runs(ids)
    return len(wanted & runs(train)) / len(wanted) if wanted else 0.0


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_shares_are_those_by_hand(
    make_folder: Make, data: st.DataObject, monkeypatch: pytest.MonkeyPatch, tmp_path_factory
) -> None:
    """Few different tokens, so that short runs are shared by chance; chunks of any size."""
    letters = st.lists(st.integers(65, 67), min_size=1, max_size=60)
    documents = data.draw(st.lists(letters, min_size=1, max_size=3))
    ids, length = data.draw(letters), data.draw(st.integers(1, 9))
    monkeypatch.setattr(overlap, "CHUNK", data.draw(st.integers(1, 40)))
    shards = data.draw(st.integers(3, 50))
    name = tmp_path_factory.mktemp("tokens") / "folder"
    folder = make_folder(documents, name=str(name), shard_tokens=shards)
    train = [token for document in documents for token in [*document, 256]]
    found = shared_runs(folder, np.array(ids), length=length)
    assert found == pytest.approx(by_hand(train, ids, length))


def test_a_text_in_the_training_split_is_refused(make_folder: Make) -> None:
    """Both are named; the held-out split may hold it, which is what it is for."""
    documents = texts(40)
    text = bytes(token for document in documents[10:20] for token in document).decode()
    require_unseen(make_folder(documents[:10], held_out=documents[10:], name="apart"), text, "wiki")
    folder = make_folder([list(text.encode())], name="mixed")
    message = rf"{re.escape(str(folder.path))}: its training split holds 100\.0% of .* text wiki"
    with pytest.raises(UserError, match=message):
        require_unseen(folder, text, "wiki")


def test_a_part_of_a_text_is_found(make_folder: Make) -> None:
    """One document of ten, whose end differs: a tenth of the text and not quite its share."""
    documents = [document for document in texts(60) if len(document) > 60][:10]
    text = bytes(token for document in documents for token in document)
    edited = [*documents[4][:-1], 65]
    folder = make_folder([documents[1][:20], edited])
    found = shared_runs(folder, np.frombuffer(text, np.uint8).astype(np.int64))
    assert found == pytest.approx((len(documents[4]) - 32) / (len(text) - 31), abs=1e-9)
    with pytest.raises(UserError, match="evaluate on one that was not trained on"):
        require_unseen(folder, text.decode(), "wiki")
    require_unseen(folder, text.decode(), "wiki", most=0.5)


def test_texts_shorter_than_a_run_share_nothing(make_folder: Make) -> None:
    folder = make_folder(texts(3))
    assert shared_runs(folder, np.array(texts(3)[0][:31])) == 0.0
    assert shared_runs(folder, np.empty(0, np.int64)) == 0.0
