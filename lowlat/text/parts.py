"""What a tokenizer is made of, whichever file it came from.

Reading files is folder.py's and gguf_vocab.py's work.
"""

from dataclasses import dataclass

import tokenizers
from tokenizers import processors


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerParts:
    """A tokenizer as read from a file, before anything is asked of it."""

    backend: tokenizers.Tokenizer
    """The Rust tokenizer: splits, merges, added tokens and the bos/eos it puts around a text."""
    special_tokens: dict[str, str]
    """bos_token, eos_token, unk_token, pad_token -> text, for those the files name."""
    eos_ids: frozenset[int]
    """Ids after which generation ends."""
    chat_template: str | None
    origin: str
    """The file or folder, for error messages."""


def set_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `backend` put `bos` before and `eos` after a text encoded with special tokens."""
    pieces = ["BOS"] * (bos is not None) + ["$A"] + ["EOS"] * (eos is not None)
    known = [
        {"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]}
        for name, token in (("BOS", bos), ("EOS", eos))
        if token is not None
    ]
    # The alias names keep tokens with spaces or colons out of the template's own little language.
    backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=known)  # type: ignore[arg-type]
