"""Documents in pieces: cut at the same places however they come, without changing tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from lowlat.text.pretokenizers import splitting
from lowlat.train.data import documents
from lowlat.train.data.documents import ChatDocument, TextDocument, text_pieces

PIECE = 23


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> object:
    patch = pytest.MonkeyPatch()
    patch.setattr(documents, "PIECE", PIECE)
    yield
    patch.undo()


TEXTS = st.text(alphabet="ab1 .\n\r\t\u3000é日", max_size=300)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 300), max_size=9))
def test_pieces_depend_on_the_text_alone(text: str, cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(borders)]
    pieces = list(text_pieces(parts))
    assert pieces == list(text_pieces([text]))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 2 * PIECE for piece in pieces)


def test_short_texts_are_whole() -> None:
    text = "a\nb" * 7 + "xy"
    assert len(text) == PIECE
    assert list(text_pieces([text])) == [text]
    assert list(text_pieces([])) == list(text_pieces([""])) == []


@pytest.mark.parametrize("family", ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"])
def test_cuts_at_line_breaks_change_no_word(family: str) -> None:
    """Holds shut: tokens that depend on how large the pieces of a document are."""
    rng = np.random.default_rng(3)
    words = ["one", "two.", "(3)", "four,", "5", "“six”", "七", "don't"]
    blanks = [" ", "\n", "\n", "\n", "\n\n", "\n  ", " \n", "  "]
    pre_tokenizer: pre_tokenizers.PreTokenizer = splitting(family, "test").pre_tokenizer()
    seen = 0
    for _ in range(200):
        text = "".join(rng.choice(words) + rng.choice(blanks) for _ in range(40))
        pieces = list(text_pieces([text]))
        if any(len(piece) == 2 * PIECE for piece in pieces[:-1]):
            continue  # cut without a line break
        seen += len(pieces) - 1
        apart = [word for piece in pieces for word, _ in pre_tokenizer.pre_tokenize_str(piece)]
        assert apart == [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
    assert seen > 100


def text_of(*pieces: str) -> TextDocument:
    return TextDocument(origin="x", pieces=lambda: pieces, source_bytes=0)


def test_fingerprints_are_of_the_text() -> None:
    assert text_of("é", "b").fingerprint() == text_of("éb").fingerprint()
    assert text_of("éb").fingerprint()[1:] == (3, True)
    assert text_of("éb").fingerprint()[0] != text_of("eb").fingerprint()[0]
    assert text_of(" \n", "\t").fingerprint()[2] is False
    assert text_of().fingerprint()[1:] == (0, False)


def test_a_chat_without_an_answer_is_empty() -> None:
    asked = {"role": "user", "content": "hi"}
    chat = ChatDocument(origin="x", messages=[asked], tools=None, source_bytes=0)
    assert chat.fingerprint()[2] is False
    told = [{"content": "hi", "role": "user"}, {"role": "assistant", "content": "ho"}]
    answered = ChatDocument(origin="x", messages=told, tools=None, source_bytes=0)
    assert answered.fingerprint()[2] is True
    assert answered.fingerprint()[0] != chat.fingerprint()[0]
    assert list(answered.texts()) == ["hi", "ho"]
