"""Input tokens of a comparison, and the windows they are split into."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lowlat.compare.implementations.base import Implementation
from lowlat.compare.trace import Window
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

FEWEST = 2
"""Minimum tokens of a window: a single token attends only to itself, without relative rotation."""


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Uniformly random token ids, determined by the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def text_ids(content: str, origin: str, count: int, paths: Sequence[Path]) -> list[int]:
    """The first `count` tokens of a text, with the tokenizer of the first checkpoint that has one.

    Raises UserError if no checkpoint has one, or for a text of less than two tokens.
    """
    ids = _tokenizer(paths).encode(content)[:count]
    if len(ids) < FEWEST:
        raise UserError(f"'{origin}' is too short: {len(ids)} tokens, at least {FEWEST} are needed")
    return ids


def windows(
    ids: Sequence[int], length: int, start: int, implementations: Sequence[Implementation]
) -> list[Window]:
    """`ids` split into windows, each starting at position `start`.

    Raises UserError for a window of one token or beyond a model's context, and for ids outside a
    vocabulary.
    """
    if min(length, len(ids)) < FEWEST:
        raise UserError(f"--tokens and --window must be at least {FEWEST}")
    for each in implementations:
        longest, vocab = each.config.max_position_embeddings, each.config.vocab_size
        if start + min(length, len(ids)) > longest:
            raise UserError(
                f"--start {start} and --window {length} reach beyond max_position_embeddings "
                f"{longest} of {each.label}"
            )
        if max(ids) >= vocab:
            raise UserError(f"token {max(ids)} is not in the vocabulary of {each.label} ({vocab})")
    cuts = [ids[first : first + length] for first in range(0, len(ids), length)]
    return [Window(torch.tensor(cut), start) for cut in cuts if len(cut) >= FEWEST]


def _tokenizer(paths: Sequence[Path]) -> Tokenizer:
    first_error: UserError | None = None
    for path in paths:
        try:
            return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_gguf(path)
        except UserError as error:
            first_error = first_error or error
    raise UserError(f"--text needs a tokenizer: {first_error}; leave --text out for random tokens")
