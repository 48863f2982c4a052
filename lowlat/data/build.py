"""Build of a tokenized dataset from text sources: deduplicate, hold out, tokenize, write.

`selection` chooses documents, `tokenizing` encodes them, `writer` writes files, `vocabulary` trains
tokenizers.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from lowlat.data.documents import ChatDocument
from lowlat.data.manifest import (
    SPLITS,
    DatasetManifest,
    Split,
    SplitManifest,
    id_type,
)
from lowlat.data.selection import BuildOptions, Selection
from lowlat.data.sources import size_of
from lowlat.data.tokenizing import BatchTokenizer
from lowlat.data.vocabulary import begin_of_text, end_of_text, train_bpe
from lowlat.data.writer import SplitWriter, write_manifest, write_tokenizer
from lowlat.text.fim_tokens import fim_tokens
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.atomic_files import atomic_folder
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress, Task


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """Result of a build."""

    path: Path
    """The dataset's folder."""
    manifest: DatasetManifest
    """Content of tokens.json."""
    asked_vocab: int | None
    """Requested size of the trained vocabulary, which is smaller if the documents have too few
    pairs; None for an existing tokenizer.
    """
    seconds: float
    """Duration of the build."""


def build(
    destination: Path,
    options: BuildOptions,
    tokenizer: Tokenizer | int,
    progress: Progress | None = None,
    *,
    may_be_empty: bool = False,
) -> BuildReport:
    """Build the tokenized dataset `destination` with `tokenizer`, or with a BPE vocabulary trained
    to that size.

    may_be_empty: allow a dataset without training documents. The folder appears complete or not at
    all. The same sources and options give the same bytes for any number of tokenizer threads
    (RAYON_NUM_THREADS). Raises UserError for options out of range, unreadable sources, documents
    that are not text, and a full disk.
    """
    progress = SilentProgress() if progress is None else progress
    start = time.monotonic()
    _check(options)
    with atomic_folder(destination) as folder:
        asked = tokenizer if isinstance(tokenizer, int) else None
        if isinstance(tokenizer, int):
            tokenizer = _trained(options, tokenizer, progress)
        manifest = _tokenised(folder, options, tokenizer, progress)
        if not may_be_empty:
            _check_documents(manifest)
        write_manifest(folder, manifest)
    seconds = time.monotonic() - start
    return BuildReport(path=destination, manifest=manifest, asked_vocab=asked, seconds=seconds)


def _check(options: BuildOptions) -> None:
    if not 0.0 <= options.held_out_share < 1.0:
        raise UserError(f"held-out share {options.held_out} must be at least 0 and below 1")
    if options.read.separator is not None and {*"\r\n"} & {*options.read.separator}:
        raise UserError("the separator must be one line, without a line break")
    if options.shard_tokens < 1:
        raise UserError(f"shard_tokens {options.shard_tokens} must be at least 1")


def _check_documents(manifest: DatasetManifest) -> None:
    """Raises UserError if the training split is empty."""
    if manifest.splits["train"].documents:
        return
    dropped = ", ".join(f"{count} {why}" for why, count in manifest.dropped.items())
    if manifest.splits["held_out"].documents:
        raise UserError(
            f"no document is left to train on, all are held out ({dropped or 'none'} dropped); "
            "give other sources, or hold out fewer"
        )
    raise UserError(
        f"{', '.join(manifest.sources)}: no documents to train on ({dropped or 'none'} dropped); "
        "give other sources"
    )


def _trained(options: BuildOptions, vocab_size: int, progress: Progress) -> Tokenizer:
    """A BPE vocabulary trained on the documents that are not held out."""
    total = size_of((*options.held_out_sources, *options.sources), options.read)
    with progress.task("Training the vocabulary", total, "bytes") as task:
        return train_bpe(_training_texts(options, task), vocab_size)


def _training_texts(options: BuildOptions, task: Task) -> Iterator[str]:
    for document, split, _ in Selection(options):
        if split == "train":
            is_chat = isinstance(document, ChatDocument)
            yield from document.texts() if is_chat else document.pieces()
        task.advance(document.source_bytes)


def _tokenised(
    folder: Path, options: BuildOptions, tokenizer: Tokenizer, progress: Progress
) -> DatasetManifest:
    """Tokenize and write both splits; returns the manifest."""
    total = size_of((*options.held_out_sources, *options.sources), options.read)
    selection = Selection(options)
    with ExitStack() as stack:
        dtype, shard = id_type(tokenizer.vocab_size), options.shard_tokens
        writers: dict[Split, SplitWriter] = {
            split: SplitWriter(folder, split, dtype, shard) for split in SPLITS
        }
        for writer in writers.values():
            stack.callback(writer.close)
        task = stack.enter_context(progress.task("Tokenizing", total, "bytes"))
        ends = end_of_text(tokenizer, options.end_of_text)
        work = BatchTokenizer(tokenizer, writers, ends, task, options.read.invalid)
        for document, split, size in selection:
            work.add(document, split, size)
        work.flush()
        splits: dict[Split, SplitManifest] = {
            split: writer.finish() for split, writer in writers.items()
        }
    dropped = selection.dropped + work.dropped
    return DatasetManifest(
        vocab_size=tokenizer.vocab_size,
        end_of_text=ends,
        begin_of_text=begin_of_text(tokenizer),
        fim=fim_tokens(tokenizer),
        tokenizer=write_tokenizer(folder, tokenizer),
        shard_tokens=shard,
        splits=splits,
        sources=(*options.held_out_sources, *options.sources),
        dropped={why: dropped[why] for why in sorted(dropped)},
    )
