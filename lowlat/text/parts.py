"""Parts of a tokenizer, independent of its file format.

`text.folder` and `text.gguf_vocab` read them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import tokenizers
from tokenizers import processors

from lowlat.utils.errors import UserError


class NoTokenizer(UserError):
    """A model's files hold no tokenizer, or one of a kind that lowlat does not support."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerParts:
    """A tokenizer as read from a file."""

    backend: tokenizers.Tokenizer
    """The Rust tokenizer: splits, merges, added tokens and the bos/eos it puts around a text."""
    special_tokens: dict[str, str]
    """bos_token, eos_token, unk_token, pad_token -> text, for those the files name."""
    eos_ids: frozenset[int]
    """Ids after which generation ends."""
    chat_template: str | None
    """Chat template of all prompts, except of prompts with tools if there is a `tool_template`."""
    origin: str
    """The file or folder, for error messages."""
    tool_template: str | None = None
    """The chat template named tool_use; None if one template serves all prompts."""


def set_bos_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make `backend` put `bos` before and `eos` after a text encoded with special tokens."""
    set_around(backend, [] if bos is None else [bos], [] if eos is None else [eos])


def set_around(backend: tokenizers.Tokenizer, before: Sequence[str], after: Sequence[str]) -> None:
    """Make `backend` put the tokens `before` and `after` around a text encoded with special
    tokens.
    """
    # Aliases, because tokens with spaces or colons would break the template syntax.
    first = {f"B{number}": token for number, token in enumerate(before)}
    last = {f"E{number}": token for number, token in enumerate(after)}
    known = [
        {"id": name, "ids": [backend.token_to_id(token)], "tokens": [token]}
        for name, token in (first | last).items()
    ]
    pieces = [*first, "$A", *last]
    backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=known)  # type: ignore[arg-type]


def around(backend: tokenizers.Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens that `backend` puts before and after a text encoded with special tokens."""
    encoding = backend.encode("a", add_special_tokens=True)
    tokens = [str(backend.id_to_token(index)) for index in encoding.ids]
    own = [place for place, added in enumerate(encoding.special_tokens_mask) if not added]
    start, end = (own[0], own[-1] + 1) if own else (len(tokens), len(tokens))
    return tokens[:start], tokens[end:]
