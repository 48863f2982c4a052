"""Contamination check: share of an evaluation text's token n-grams that occur in training data.

A check, not a decontamination: no document is removed. With n-grams of 32 tokens, a lightly
edited copy is still detected; common phrases are not.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from lowlat.data.dataset import TokenizedDataset
from lowlat.data.shuffle import GOLDEN, finish
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress

LENGTH = 32
"""Tokens of an n-gram."""
MOST_SHARED = 0.001
"""Tolerated share of n-grams in training data: licences, tables, refrains."""
CHUNK = 1 << 20
"""Tokens compared at once."""


def shared_runs(
    folder: TokenizedDataset,
    ids: Int64[np.ndarray, " tokens"],
    *,
    length: int = LENGTH,
    progress: Progress | None = None,
) -> float:
    """Share of the n-grams of `length` tokens in `ids`, encoded by the tokenizer of `folder`, that
    also occur in its training split; 0 for a text shorter than `length`.

    N-grams are compared by 64-bit hashes; false matches are negligible.
    """
    tokens = folder.num_tokens("train")

    def chunks() -> Iterator[Int64[np.ndarray, " chunk"]]:
        with (progress or SilentProgress()).task("Looking for the evaluation text", tokens) as task:
            for first in range(0, tokens, CHUNK):
                last = min(first + CHUNK + length - 1, tokens)
                yield folder.tokens("train", np.arange(first, last))
                task.advance(min(CHUNK, tokens - first))

    return share_seen(ids, chunks(), length=length)


def share_seen(
    ids: Int64[np.ndarray, " tokens"],
    texts: Iterable[Int64[np.ndarray, " text"]],
    *,
    length: int = LENGTH,
) -> float:
    """As `shared_runs`, in any of `texts`."""
    wanted = np.unique(_hashes(ids, length))
    if not len(wanted):
        return 0.0
    found = np.zeros(len(wanted), np.bool_)
    for text in texts:
        for first in range(0, len(text), CHUNK):
            own = _hashes(text[first : first + CHUNK + length - 1], length)
            places = np.minimum(np.searchsorted(wanted, own), len(wanted) - 1)
            found[places[wanted[places] == own]] = True
    return float(found.mean())


def require_unseen(
    folder: TokenizedDataset,
    text: str,
    name: str | Path,
    *,
    most: float = MOST_SHARED,
    progress: Progress | None = None,
) -> None:
    """Raises UserError if more than the share `most` of the evaluation text `text`, called `name`,
    is in the training split of `folder`.
    """
    ids = np.array(folder.tokenizer().encode(text), np.int64)
    share = shared_runs(folder, ids, progress=progress)
    if share > most:
        raise UserError(
            f"{folder.path}: its training split holds {share:.1%} of the evaluation text {name}; "
            "train on other text, or evaluate on one that was not trained on"
        )


def _hashes(ids: Int64[np.ndarray, " tokens"], length: int) -> UInt64[np.ndarray, " runs"]:
    """Polynomial hash of each n-gram: sum of finish(id + GOLDEN) * GOLDEN^index modulo 2^64.

    Hashes are combined from halves, so the cost grows with the logarithm of `length`.
    """
    if len(ids) < length:
        return np.empty(0, np.uint64)
    if length == 1:
        return finish(ids.astype(np.uint64) + np.uint64(GOLDEN))
    half = length // 2
    left = _hashes(ids, half)
    right = left if length == 2 * half else _hashes(ids, length - half)
    runs = len(ids) - length + 1
    factor = np.uint64(pow(GOLDEN, half, 1 << 64))
    return left[:runs] + right[half : half + runs] * factor
