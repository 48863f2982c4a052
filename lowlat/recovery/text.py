"""The text that a model is healed on: tokens with some held out, and none of the evaluation text.

Owns how text becomes documents here and what is too little; token folders are `train.data`'s.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import Int

from lowlat.data.build import build
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.documents import BadDocument, ReadOptions
from lowlat.data.manifest import Split
from lowlat.data.overlap import MOST_SHARED, share_seen, shared_runs
from lowlat.data.selection import BuildOptions
from lowlat.data.sources import DATASETS, is_records
from lowlat.data.text_files import read_text
from lowlat.data.vocabulary import KNOWN_ENDS
from lowlat.recovery.wanted import text_files
from lowlat.text.plain import TABLES
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.run.recovery import EVALUATED_TOKENS
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

SHORTEST, LONGEST, PASSAGES = 1 << 11, 1 << 14, 64
"""Plain texts are cut into passages of about a 64th of all, from 2,048 characters to 16,384, at the
next line: so there are documents to hold out, and rows of training have room in them.
"""
IN_OTHER_WORDS = {
    r", or pass\s+--invalid .*": "",
    r"name the field with --field": "call the field 'text'",
    r"say which is meant, --field .*": "leave one of them out",
}
"""Endings of errors that name options of `lowlat data build`, and what is to be done here."""
HELD_OUT = (0.01, 0.05, 0.2, 0.5)
"""Shares of the documents to hold out, of which the first that gives enough is taken."""


def build_tokens(
    folder: Path, texts: Sequence[str], tokenizer: Tokenizer, length: int, progress: Progress
) -> TokenizedDataset:
    """Make the token folder `folder` of `texts`, for rows of `length` tokens.

    Files of plain text are cut into passages. Raises UserError naming what is no text, and where
    there is too little of it.
    """
    partial, passages = folder.with_name(f"{folder.name}-new"), folder.with_suffix(".jsonl")
    sources, end = _sources(texts, passages), _end_of_text(tokenizer)
    for share in HELD_OUT:
        shutil.rmtree(partial, ignore_errors=True)
        options = BuildOptions(sources=sources, held_out=share, end_of_text=end)
        try:
            # Too little of either split is told with what is needed.
            build(partial, options, tokenizer, progress, may_be_empty=True)
        except BadDocument as error:
            raise _bad_text(error) from error
        except UserError as error:
            if error.__cause__ is not None:  # of the disk, not of the text
                raise
            raise _bad_text(error) from error
        if TokenizedDataset.open(partial).num_tokens("held_out") > EVALUATED_TOKENS:
            break
    _check_enough(TokenizedDataset.open(partial), texts, length)
    passages.unlink(missing_ok=True)
    partial.rename(folder)
    return TokenizedDataset.open(folder)


def require_unseen(
    folder: TokenizedDataset, ids: Int[np.ndarray, " tokens"], name: Path, progress: Progress
) -> None:
    """Raises UserError where the training split of `folder` holds the evaluation text `ids`, whose
    file is `name`.
    """
    _require_few(shared_runs(folder, ids, progress=progress), name, "the text of --text")


def require_uncalibrated(
    calibration: Iterable[Int[np.ndarray, " length"]],
    ids: Int[np.ndarray, " tokens"],
    name: Path,
    origin: str,
) -> None:
    """Raises UserError where the texts that a model is calibrated on hold the evaluation text
    `ids`, whose file is `name`. `origin` is what these texts are called.
    """
    _require_few(share_seen(ids, calibration), name, origin)


def _require_few(share: float, name: Path, origin: str) -> None:
    if share > MOST_SHARED:
        raise UserError(
            f"--evaluate {name}: {share:.1%} of it is in {origin}; evaluate on text that the "
            "model is not made with"
        )


def _end_of_text(tokenizer: Tokenizer) -> str | None:
    """The token that ends a document, where a build would ask which: the first, as those that end
    the turns of a chat come later. None where it would not.
    """
    ids = {text: index for index, text in tokenizer.added_tokens.items()}
    found = {ids[text] for text in KNOWN_ENDS if text in ids} or tokenizer.eos_ids
    ends = [text for text in ids if ids[text] in found]
    return min(ends, key=ids.__getitem__) if len(found) > 1 and ends else None


def _sources(texts: Iterable[str], passages: Path) -> tuple[str, ...]:
    """Sources for `build`: what consists of documents as it is, the rest cut into `passages`."""
    records: list[str] = []
    plain: list[Path] = []
    for text in texts:
        if text.startswith(DATASETS):
            records.append(text)
            continue
        files = text_files(text)
        if files == [Path(text)] and text.lower().removesuffix(".gz").endswith(TABLES):
            raise UserError(
                f"--text: {text}: by its name it holds records; give them as .jsonl with a field "
                "'text', as .parquet, or as plain text"
            )
        for file in files:
            if is_records(file):
                records.append(str(file))
            else:
                plain.append(file)
    if not plain:
        return tuple(records)
    size = sum(file.stat().st_size for file in plain) // PASSAGES
    length = min(max(size, SHORTEST), LONGEST)
    with passages.open("w", encoding="utf-8") as out:
        for passage in chain.from_iterable(_passages(file, length) for file in plain):
            out.write(json.dumps({"text": passage}, ensure_ascii=False) + "\n")
    return (str(passages), *records)


def _passages(file: Path, length: int) -> Iterator[str]:
    try:
        for document in read_text(file, ReadOptions()):
            for piece in document.pieces():
                if "\0" in piece:
                    raise UserError(f"--text: {file}: holds zero bytes, so it is not text")
                yield from _cut(piece, length)
    except BadDocument as error:
        raise _bad_text(error) from error


def _cut(text: str, length: int) -> Iterator[str]:
    start = 0
    while len(text) - start > 2 * length:
        line = text.find("\n", start + length, start + 2 * length)
        stop = start + 2 * length if line < 0 else line + 1
        yield text[start:stop]
        start = stop
    yield text[start:]


def _bad_text(error: UserError) -> UserError:
    words = str(error)
    for ending, other in IN_OTHER_WORDS.items():
        words = re.sub(f"{ending}$", other, words)
    return UserError(f"--text: {words}")


def _check_enough(made: TokenizedDataset, texts: Sequence[str], length: int) -> None:
    least = length + 1
    splits: dict[Split, str] = {"train": "to train on", "held_out": "held out to measure on"}
    for split, what in splits.items():
        found = made.num_tokens(split)
        if found < least:
            documents = sum(facts.documents for facts in made.manifest.splits.values())
            raise UserError(
                f"--text: {', '.join(texts)}: of {documents} documents {found} tokens are {what}, "
                f"at least {least} are needed; add text, or give more documents"
            )
