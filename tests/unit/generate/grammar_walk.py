"""Random outputs of a grammar, and small tokenizers that make it hard to follow."""

import random
from collections.abc import Iterator

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models

from lowlat.generate.grammar import CompiledGrammar, GrammarState
from lowlat.text.token_bytes import byte_alphabet
from lowlat.text.tokenizer import Tokenizer
from tests.fakes import byte_backend, wrapped

PIECES = (b'{"', b'":', b"ab", b"\xc3\xa9", b"\xa9\xc3", b"\xa9x", b"\xf0\x9f\x98", b"\n  ")
"""Tokens beside the single bytes: some end or begin in the middle of a character."""


def uneven_tokenizer(eos: tuple[str, ...] = ("</s>", "<end>")) -> Tokenizer:
    """Single bytes (0 to 255), PIECES, then <s>, </s>, <end>, <tool>; ends with any of `eos`."""
    alphabet = byte_alphabet()
    visible = {byte: char for char, byte in alphabet.items()}
    pieces = ["".join(visible[byte] for byte in piece) for piece in PIECES]
    vocab = alphabet | {piece: 256 + index for index, piece in enumerate(pieces)}
    special = ["<s>", "</s>", "<end>", "<tool>"]
    return wrapped(byte_backend(special, models.BPE(vocab=vocab, merges=[])), eos=eos)


def stripping_tokenizer() -> Tokenizer:
    """Sentencepiece: a space is U+2581, and one at the start of a text is dropped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["\u2581", "\u2581{", "\u2581a", '{"', "a", "b", "\u2581\u2581"]
    vocab = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return wrapped(backend)


def allowed(state: GrammarState) -> list[int]:
    return torch.nonzero(state.mask()).flatten().tolist()


class Walker:
    """Walks with a fixed seed: closing characters come often, so that most outputs end."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self._random = random.Random(seed)

    def choose(self, tokens: list[int]) -> int:
        """A token, or an end-of-sequence id where the output may end."""
        closing = [t for t in tokens if self.tokenizer.id_to_bytes(t)[:1] in (b'"', b"}", b"]")]
        ends = [token for token in tokens if token in self.tokenizer.eos_ids]
        for preferred in (ends, closing):
            if preferred and self._random.random() < 0.4:
                return self._random.choice(preferred)
        return self._random.choice(tokens)

    def walk(self, grammar: CompiledGrammar, limit: int = 2000) -> list[int] | None:
        """The ids of one output without its end; None if it is longer than `limit` tokens."""
        state = grammar.start()
        ids: list[int] = []
        while not state.is_done:
            if len(ids) == limit:
                return None
            token = self.choose(allowed(state))
            state.accept(token)
            if token in self.tokenizer.eos_ids:
                break
            ids.append(token)
        return ids


def texts(grammar: CompiledGrammar, tokenizer: Tokenizer, seeds: int = 25) -> Iterator[str]:
    """The finished outputs of that many walks, as a client would see them."""
    for seed in range(seeds):
        ids = Walker(tokenizer, seed).walk(grammar)
        if ids is not None:
            assert not set(ids) & tokenizer.special_ids
            yield tokenizer.decode(ids)
