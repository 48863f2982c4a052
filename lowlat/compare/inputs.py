"""What both sides read: token ids and the windows they are cut into."""

from collections.abc import Sequence
from pathlib import Path

import torch

from lowlat.compare.side import Side
from lowlat.compare.trace import Window
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError

FEWEST = 2
"""With one token attention has nothing to choose from, and position 0 hides every rotation."""


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    """Tokens drawn evenly, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count,), generator=generator).tolist()


def text_ids(content: str, origin: str, count: int, paths: Sequence[Path]) -> list[int]:
    """The first `count` tokens of a text, by the tokenizer of the first checkpoint that has one.

    Raises UserError where none has, or for a text of less than two tokens.
    """
    ids = _tokenizer(paths).encode(content)[:count]
    if len(ids) < FEWEST:
        raise UserError(f"'{origin}' is too short: {len(ids)} tokens, at least {FEWEST} are needed")
    return ids


def windows(ids: Sequence[int], length: int, start: int, sides: Sequence[Side]) -> list[Window]:
    """`ids` cut into windows that begin at position `start` each.

    Raises UserError for a window of one token or beyond a model's context, and for ids that are
    not in a vocabulary.
    """
    if min(length, len(ids)) < FEWEST:
        raise UserError(f"--tokens and --window must be at least {FEWEST}")
    for side in sides:
        longest, vocab = side.config.max_position_embeddings, side.config.vocab_size
        if start + min(length, len(ids)) > longest:
            raise UserError(
                f"--start {start} and --window {length} reach beyond max_position_embeddings "
                f"{longest} of {side.label}"
            )
        if max(ids) >= vocab:
            raise UserError(f"token {max(ids)} is not in the vocabulary of {side.label} ({vocab})")
    cuts = [ids[first : first + length] for first in range(0, len(ids), length)]
    return [Window(torch.tensor(cut), start) for cut in cuts if len(cut) >= FEWEST]


def _tokenizer(paths: Sequence[Path]) -> Tokenizer:
    fault: UserError | None = None
    for path in paths:
        try:
            return Tokenizer.from_folder(path) if path.is_dir() else Tokenizer.from_gguf(path)
        except UserError as error:
            fault = fault or error
    raise UserError(f"--text needs a tokenizer: {fault}; leave --text out for random tokens")
