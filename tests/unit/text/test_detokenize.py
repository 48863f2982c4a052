"""Streaming text out: nothing shown twice, nothing taken back, nothing lost."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowlat.text.detokenize import Detokenizer
from lowlat.text.tokenizer import Tokenizer

FEW = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def stream(tokenizer: Tokenizer, ids: list[int], **options: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **options)
    return [*map(detokenizer.push, ids), detokenizer.flush()]


@FEW
@given(text=SCALARS)
def test_text_comes_back_whole(tokenizer: Tokenizer, text: str) -> None:
    """Regression: half characters shown as U+FFFD and corrected later."""
    pieces = stream(tokenizer, tokenizer.encode(text, parse_special=False))
    assert "".join(pieces) == text
    assert pieces[-1] == ""


@FEW
@given(ids=st.lists(st.integers(0, 340), max_size=40), skip=st.booleans())
def test_any_ids_give_what_decode_gives(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    """Random ids are mostly invalid UTF-8, some special and some outside the vocabulary."""
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == expected


def test_a_split_character_appears_with_its_last_byte(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.encode(char)[0] for char in "x"] + byte_ids(tokenizer, "\u20ac".encode())
    assert stream(tokenizer, ids) == ["x", "", "", "\u20ac", ""]


def test_bytes_without_a_character_are_replaced(tokenizer: Tokenizer) -> None:
    cut, _, _ = byte_ids(tokenizer, "\u20ac".encode())
    letter = tokenizer.encode("x")[0]
    assert stream(tokenizer, [cut, letter]) == ["", "\ufffdx", ""]
    assert stream(tokenizer, [letter, cut]) == ["x", "", "\ufffd"]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    by_bytes = {tokenizer.id_to_bytes(index): index for index in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in data]


def test_flush_starts_a_new_text(tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(tokenizer)
    detokenizer.push(byte_ids(tokenizer, b"\xe2")[0])
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_drops_only_the_leading_space(
    make_sentencepiece: Callable[..., Path], prefix: bool
) -> None:
    """Regression: a space lost at every token, or one too many at the start."""
    tokenizer = Tokenizer.from_gguf(make_sentencepiece(ggml__add_space_prefix=prefix))
    ids = tokenizer.encode(" a abc a")
    assert "".join(stream(tokenizer, ids)) == " a abc a" == tokenizer.decode(ids)
    assert tokenizer.strips_leading_space is prefix


def test_sentencepiece_bytes_join_to_characters(make_sentencepiece: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(make_sentencepiece())
    euro = [3 + byte for byte in "\u20ac".encode()]
    assert stream(tokenizer, [259, *euro, 263]) == ["", "", "", "\u20ac", " a", ""]
