"""Bytes of single tokens, for byte-level and SentencePiece BPE vocabularies.

Byte-level vocabularies write every byte as one visible character; SentencePiece vocabularies write
a space as U+2581, and characters without a token as bytes <0xNN> (byte fallback).
`text.detokenize` joins the bytes.
"""

import json
import re

import tokenizers

from lowlat.text.parts import NoTokenizer

SPACE_MARK = "\u2581"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies: itself if visible, else U+0100 and up."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


class TokenBytes:
    """Bytes of single tokens. Raises NoTokenizer for a decoder of neither of the kinds above."""

    def __init__(self, backend: tokenizers.Tokenizer, origin: str) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}
        steps = _decoder_steps(backend)
        kinds = [step["type"] for step in steps]
        self._alphabet = byte_alphabet() if kinds == ["ByteLevel"] else None
        if self._alphabet is None and not _is_sentencepiece(steps):
            raise NoTokenizer(
                f"{origin}: decoder {'+'.join(kinds) or 'none'} is not supported; byte-level and"
                " sentencepiece BPE tokenizers are"
            )
        self.strips_leading_space = kinds[-1:] == ["Strip"]

    def of(self, token_id: int) -> bytes:
        """The bytes of `token_id`; empty for an id without a token (models pad their tables)."""
        if token_id not in self._known:
            token = self._backend.id_to_token(token_id)
            self._known[token_id] = b"" if token is None else self._bytes(token)
        return self._known[token_id]

    def _bytes(self, token: str) -> bytes:
        if self._alphabet is None:
            if match := BYTE_TOKEN.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace(SPACE_MARK, " ").encode()
        # Added tokens are written plainly, and use characters outside the alphabet.
        if all(char in self._alphabet for char in token):
            return bytes(self._alphabet[char] for char in token)
        return token.encode()


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict]:
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return [step for step in steps if step["type"] != "Fuse"]


def _is_sentencepiece(steps: list[dict]) -> bool:
    """Whether `steps` are: U+2581 to space, <0xNN> to bytes, maybe one leading space removed."""
    replace = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return steps in (
        [replace, {"type": "ByteFallback"}],
        [replace, {"type": "ByteFallback"}, strip],
    )
