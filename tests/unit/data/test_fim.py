"""FillInTheMiddle: the parts of a document are all there, in order, and cut between characters."""

import pytest

from lowlat.data.fim import MIN_TOKENS
from lowlat.utils.errors import UserError

from .conftest import END, SPECIAL, Make, texts
from .test_packing import cut, stream, windows

PREFIX, SUFFIX, MIDDLE = (256 + SPECIAL.index(token) for token in SPECIAL[3:])


def restored(document: tuple[int, ...], head: int = 0) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The plain text of a rearranged document, and where its middle began and ended."""
    assert document[head] == PREFIX
    suffix, middle = document.index(SUFFIX), document.index(MIDDLE)
    first, last, between = (
        document[head + 1 : suffix],
        document[suffix + 1 : middle],
        document[middle + 1 :],
    )
    cuts = len(first), len(first) + len(between)
    return (*document[:head], *first, *between, *last), cuts


def test_rearranged_documents_hold_the_whole_text(make_folder: Make) -> None:
    documents = texts(61)
    plain = {tuple(document) for document in documents}
    found = cut(stream(make_folder(documents), fim_rate=1.0))
    seen = [document for document in found if document[:1] == (PREFIX,)]
    kept = [document for document in found if document[:1] != (PREFIX,)]
    assert len(seen) > 20
    assert {restored(document)[0] for document in seen} < plain
    assert len({restored(document)[1] for document in seen}) > 15
    assert set(kept) < plain
    assert max(len(document) for document in kept) + 1 < MIN_TOKENS
    assert min(len(restored(document)[0]) for document in seen) + 1 >= MIN_TOKENS


def test_the_begin_token_stays_in_front(make_folder: Make) -> None:
    documents = texts(61)
    found = cut(stream(make_folder(documents, head=[257]), fim_rate=1.0))
    seen = [document for document in found if PREFIX in document]
    assert len(seen) > 20
    plain = {(257, *document) for document in documents}
    assert {restored(document, head=1)[0] for document in seen} < plain


def test_the_rate_is_kept_and_every_epoch_draws_again(make_folder: Make) -> None:
    folder = make_folder([document * 9 for document in texts(199)])
    chosen = []
    for epoch in range(2):
        whole = cut(stream(folder, epoch, fim_rate=0.25))
        chosen.append({restored(ids)[0] for ids in whole if PREFIX in ids})
        assert 0.15 < len(chosen[-1]) / len(whole) < 0.35
    assert 0 < len(chosen[0] & chosen[1]) < len(chosen[0]) / 2


def test_cuts_spare_characters(make_folder: Make) -> None:
    """Regression: infilling that teaches half a character, where tokens are single bytes."""
    documents = [[*f"{index:02}{'日本🐟é' * 7}".encode()] for index in range(43)]
    found = cut(stream(make_folder(documents), fim_rate=1.0))
    seen = [document for document in found if PREFIX in document]
    assert len(seen) > 30
    for document in seen:
        marks = [document.index(mark) for mark in (PREFIX, SUFFIX, MIDDLE)]
        for start, stop in zip(marks, [*marks[1:], len(document)], strict=True):
            bytes(document[start + 1 : stop]).decode()


def test_without_marks_infilling_is_an_error(make_folder: Make) -> None:
    folder = make_folder(texts(5), special=SPECIAL[:3])
    with pytest.raises(UserError, match=r"no fill-in-the-middle tokens such as <\|fim_prefix\|>"):
        windows(folder, fim_rate=0.1)
    assert windows(folder).per_epoch > 0


def test_chats_are_not_rearranged(make_folder: Make) -> None:
    documents = texts(5)
    masks = [[True] * len(document) for document in documents]
    with pytest.raises(UserError, match="has chats, which cannot be rearranged"):
        windows(make_folder(documents, masks=masks), fim_rate=0.1)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_out_of_range(make_folder: Make, rate: float) -> None:
    with pytest.raises(UserError, match="must be within 0 and 1"):
        windows(make_folder(texts(5)), fim_rate=rate)


def test_end_tokens_stay_last(make_folder: Make) -> None:
    tokens = stream(make_folder(texts(61)), fim_rate=1.0)
    after = {tokens[place + 1] for place in range(len(tokens) - 1) if tokens[place] == END}
    assert not after & {END, SUFFIX, MIDDLE}
