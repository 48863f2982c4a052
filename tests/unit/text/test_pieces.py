"""Texts in pieces: cut at the same places however they come, without changing tokens."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, pre_tokenizers, processors

from lowlat.text import pieces
from lowlat.text.pieces import (
    TooManyTokens,
    encode_long,
    encode_plain,
    encode_prompt_text,
    text_pieces,
)
from lowlat.text.pretokenizers import splitting
from tests.fakes import BOS, EOS, byte_backend, byte_tokenizer, wrapped

PIECE = 23


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> object:
    patch = pytest.MonkeyPatch()
    patch.setattr(pieces, "PIECE", PIECE)
    patch.setattr(pieces, "PROMPT_PIECE", PIECE)
    yield
    patch.undo()


TEXTS = st.text(alphabet="ab1 .\n\r\t\u3000é日", max_size=300)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 300), max_size=9))
def test_pieces_depend_on_the_text_alone(text: str, cuts: list[int]) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(borders)]
    found = list(text_pieces(parts))
    assert found == list(text_pieces([text]))
    assert "".join(found) == text
    assert all(0 < len(piece) <= 2 * PIECE for piece in found)


def test_short_texts_are_whole() -> None:
    text = "a\nb" * 7 + "xy"
    assert len(text) == PIECE
    assert list(text_pieces([text])) == [text]
    assert list(text_pieces([])) == list(text_pieces([""])) == []


@pytest.mark.parametrize(
    "family",
    ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "deepseek-v3", "deepseek-llm", "default"],
)
@pytest.mark.parametrize(
    "blanks", [(" ", "\n", "\n", "\n", "\n\n", "\n  ", " \n", "  "), (" ", " \n ", "  ", "\t")]
)
def test_cuts_change_no_word(family: str, blanks: tuple[str, ...]) -> None:
    """Regression: tokens that depend on how large the pieces of a text are."""
    rng = np.random.default_rng(3)
    words = ["one", "two.", "(3)", "four,", "5", "“six”", "七", "don't"]
    pre_tokenizer: pre_tokenizers.PreTokenizer = splitting(family, "test").pre_tokenizer()
    seen = 0
    for _ in range(200):
        text = "".join(rng.choice(words) + rng.choice(blanks) for _ in range(40))
        found = list(text_pieces([text]))
        if any(len(piece) == 2 * PIECE for piece in found[:-1]):
            continue  # cut where there is neither
        seen += len(found) - 1
        apart = [word for piece in found for word, _ in pre_tokenizer.pre_tokenize_str(piece)]
        assert apart == [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]
    assert seen > 100


LONG = "three\nfour five\n\nsix é 七\n" * 20


@pytest.mark.parametrize("text", ["", "x", "one\ntwo", LONG])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_long_texts_are_encoded_as_short_ones(text: str, around: str) -> None:
    """What stands before and behind a text stands there once."""
    tokenizer = byte_tokenizer()
    specials = [("<s>", BOS), ("</s>", EOS)]
    template = processors.TemplateProcessing(single=around, special_tokens=specials)
    tokenizer._backend.post_processor = template  # pyright: ignore[reportPrivateUsage]
    assert encode_long(tokenizer, text).tolist() == tokenizer.encode(text)
    assert encode_plain(tokenizer, text).tolist() == tokenizer.encode_batch([text])[0]
    whole = tokenizer.encode(text)
    assert encode_prompt_text(tokenizer, text, len(whole)) == whole
    options = {"add_special_tokens": False, "parse_special": False}
    assert encode_prompt_text(tokenizer, text, 10_000, **options) == tokenizer.encode(
        text, **options
    )
    if text == LONG:
        with pytest.raises(TooManyTokens, match=f"more than {len(whole) - 1} tokens"):
            encode_prompt_text(tokenizer, text, len(whole) - 1)


def test_a_long_prompt_is_refused_before_all_of_it_is_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, seen = byte_tokenizer(), list[int]()
    encode = tokenizer.encode

    def counted(text: str, **options: bool) -> list[int]:
        seen.append(len(text))
        return encode(text, **options)

    monkeypatch.setattr(tokenizer, "encode", counted)
    for text in ("x" * 100_000, "word " * 20_000):
        seen.clear()
        with pytest.raises(TooManyTokens):
            encode_prompt_text(tokenizer, text, 200)
        assert 200 < sum(seen) < 300 and max(seen) <= 2 * PIECE


@pytest.mark.parametrize(
    "token",
    [
        AddedToken("[x y]"),
        AddedToken("<m> "),
        AddedToken("\n<m>"),
        AddedToken("<m>", rstrip=True),
        AddedToken("<m>", lstrip=True),
    ],
)
def test_texts_whose_added_tokens_take_blanks_stay_whole(token: AddedToken) -> None:
    """Regression: a cut inside of a token, or between one and the blank that it takes."""
    backend = byte_backend(["<s>", "</s>"])
    backend.add_tokens([token])
    tokenizer = wrapped(backend)
    text = f"{token.content} a {token.content}b " * 40
    assert encode_long(tokenizer, text).tolist() == tokenizer.encode(text)
    whole = tokenizer.encode(text)
    assert encode_prompt_text(tokenizer, text, 2 * len(whole)) == whole
    with pytest.raises(TooManyTokens):
        encode_prompt_text(tokenizer, text, len(whole) // 2)


def test_texts_that_a_tokenizer_begins_in_a_way_of_its_own_stay_whole() -> None:
    """Regression: a blank at every cut, as sentencepiece puts one before each text."""
    tokenizer = byte_tokenizer()
    tokenizer._backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportPrivateUsage]
    assert len(list(text_pieces([LONG]))) > 5
    assert encode_long(tokenizer, LONG).tolist() == tokenizer.encode(LONG)
    assert encode_plain(tokenizer, LONG).tolist() == tokenizer.encode_batch([LONG])[0]
    assert encode_prompt_text(tokenizer, LONG, 2 * len(LONG)) == tokenizer.encode(LONG)


def test_cutting_takes_time_in_proportion(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the characters that are copied: regression: a copy of all that is left at every cut."""
    copied = 0

    class Counted(str):
        def __getitem__(self, key: Any) -> "Counted":
            nonlocal copied
            found = Counted(super().__getitem__(key))
            copied += len(found)
            return found

        def __radd__(self, other: str) -> "Counted":
            return self

    text = Counted("word " * 40_000)
    assert sum(map(len, text_pieces([text]))) == len(text)
    assert copied <= 2 * len(text)
