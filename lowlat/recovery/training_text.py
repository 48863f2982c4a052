"""Training text of recovery training: tokenized dataset, held-out documents, contamination check.

Plain text files are cut into passages, which become documents. `lowlat.data` builds the folder.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from lowlat.data.build import build
from lowlat.data.dataset import TokenizedDataset
from lowlat.data.documents import BadDocument, ReadOptions
from lowlat.data.manifest import Split
from lowlat.data.overlap import MOST_SHARED
from lowlat.data.selection import BuildOptions
from lowlat.data.sources import DATASETS, files_of, is_records
from lowlat.data.text_files import read_text
from lowlat.data.vocabulary import KNOWN_ENDS
from lowlat.text.plain import TABLES
from lowlat.text.tokenizer import Tokenizer
from lowlat.train.run.distill import EVALUATED_TOKENS
from lowlat.utils.atomic_files import rename_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

SHORTEST, LONGEST, PASSAGES = 1 << 11, 1 << 14, 64
"""Plain text is cut at line ends into about PASSAGES passages of SHORTEST to LONGEST characters:
short enough to hold some out, long enough for training sequences.
"""
REMEDIES = {
    r", or pass\s+--invalid .*": "",
    r"name the field with --field": "call the field 'text'",
    r"choose with --field .*": "leave one of them out",
}
"""Patterns of remedies that name options of `lowlat data build`, and their replacements."""
HELD_OUT = (0.01, 0.05, 0.2, 0.5)
"""Shares of documents to hold out; the first that gives enough tokens is used."""


def build_tokens(
    folder: Path, texts: Sequence[str], tokenizer: Tokenizer, length: int, progress: Progress
) -> TokenizedDataset:
    """Build the tokenized dataset `folder` from `texts`, for sequences of `length` tokens.

    Raises UserError naming a file that is not text, or if there is too little text.
    """
    partial, passages = folder.with_name(f"{folder.name}-new"), folder.with_suffix(".jsonl")
    sources, end = _sources(texts, passages), _end_of_text(tokenizer)
    for share in HELD_OUT:
        shutil.rmtree(partial, ignore_errors=True)
        options = BuildOptions(sources=sources, held_out=share, end_of_text=end)
        try:
            # may_be_empty, because _check_enough reports the required number of tokens
            build(partial, options, tokenizer, progress, may_be_empty=True)
        except BadDocument as error:
            raise _bad_text(error) from error
        except UserError as error:
            if error.__cause__ is not None:  # a disk error
                raise
            raise _bad_text(error) from error
        if TokenizedDataset.open(partial).num_tokens("held_out") > EVALUATED_TOKENS:
            break
    _check_enough(TokenizedDataset.open(partial), texts, length)
    passages.unlink(missing_ok=True)
    rename_folder(partial, folder)
    return TokenizedDataset.open(folder)


def require_disjoint(share: float, name: Path, origin: str) -> None:
    """Raises UserError if much of the evaluation text `name`, `share` of it, is in `origin`."""
    if share > MOST_SHARED:
        raise UserError(
            f"--evaluate {name}: {share:.1%} of it is in {origin}; give text that is neither "
            "calibration nor training text"
        )


def text_files(text: str) -> list[Path]:
    """The files of one `--text` source. Raises UserError if there are none."""
    try:
        return files_of(text, ReadOptions())
    except UserError as error:
        raise UserError(f"--text: {str(error).removesuffix(' or --only')}") from error


def text_fingerprint(text: str) -> str:
    """One `--text` source by name, with a hash of its files' names, sizes and times."""
    if text.startswith(DATASETS):
        return text
    digest = hashlib.sha256()
    for file in text_files(text):
        stat = file.stat()
        digest.update(f"{file} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return f"{Path(text).resolve()} {digest.hexdigest()[:12]}"


def _end_of_text(tokenizer: Tokenizer) -> str | None:
    """The token that ends a document, if the tokenizer has several candidates: the first, because
    those that end chat turns follow it. None for a single candidate, which needs no choice.
    """
    ids = {text: index for index, text in tokenizer.added_tokens.items()}
    found = {ids[text] for text in KNOWN_ENDS if text in ids} or tokenizer.eos_ids
    ends = [text for text in ids if ids[text] in found]
    return min(ends, key=ids.__getitem__) if len(found) > 1 and ends else None


def _sources(texts: Iterable[str], passages: Path) -> tuple[str, ...]:
    """Sources for `build`: files of records, and `passages`, which holds all plain text."""
    records: list[str] = []
    plain: list[Path] = []
    for text in texts:
        if text.startswith(DATASETS):
            records.append(text)
            continue
        files = text_files(text)
        if files == [Path(text)] and text.lower().removesuffix(".gz").endswith(TABLES):
            raise UserError(
                f"--text: {text}: this is a file of records; give them as .jsonl with a field "
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
                    raise UserError(f"--text: {file}: contains zero bytes, so it is not text")
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
    message = str(error)
    for ending, other in REMEDIES.items():
        message = re.sub(f"{ending}$", other, message)
    return UserError(f"--text: {message}")


def _check_enough(made: TokenizedDataset, texts: Sequence[str], length: int) -> None:
    least = length + 1
    splits: dict[Split, str] = {"train": "for training", "held_out": "held out for evaluation"}
    for split, what in splits.items():
        found = made.num_tokens(split)
        if found < least:
            documents = sum(facts.documents for facts in made.manifest.splits.values())
            raise UserError(
                f"--text: {', '.join(texts)}: {found} tokens of {documents} documents are {what}, "
                f"at least {least} are needed; add text, or give more documents"
            )
