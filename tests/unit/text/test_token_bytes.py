"""Bytes of single tokens, against the library's own decoding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models

from lowlat.text.token_bytes import TokenBytes, byte_alphabet
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError


def test_the_alphabet_covers_every_byte_once() -> None:
    """The published map: space, newline and 0xAD move, A and 0xFF stay."""
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert (alphabet["\u0120"], alphabet["\u010a"], alphabet["\u0143"]) == (0x20, 0x0A, 0xAD)
    assert (alphabet["A"], alphabet["\u00ff"]) == (0x41, 0xFF)


def test_every_token_is_what_the_library_decodes(
    tokenizer: Tokenizer, backend: tokenizers.Tokenizer
) -> None:
    for index in range(tokenizer.vocab_size):
        expected = backend.decode([index], skip_special_tokens=False)
        assert tokenizer.id_to_bytes(index).decode("utf-8", "replace") == expected


def test_an_id_without_a_token_has_no_bytes(tokenizer: Tokenizer) -> None:
    """Models pad their embedding; the padding must decode to nothing, not fail."""
    assert tokenizer.id_to_bytes(tokenizer.vocab_size + 5) == b""


def test_sentencepiece_bytes_and_spaces(make_sentencepiece: Callable[..., Path]) -> None:
    tokenizer = Tokenizer.from_gguf(make_sentencepiece())
    assert tokenizer.id_to_bytes(3 + 0xE2) == b"\xe2"
    assert tokenizer.id_to_bytes(263) == b" a"


def test_other_decoders_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.WordPiece()
    with pytest.raises(UserError, match="model: decoder WordPiece is not supported"):
        TokenBytes(backend, "model")
    backend = tokenizers.Tokenizer(models.BPE())
    with pytest.raises(UserError, match="model: decoder none is not supported"):
        TokenBytes(backend, "model")
