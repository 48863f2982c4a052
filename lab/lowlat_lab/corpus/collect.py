"""Corpus collection from a recipe: fetch, extract, clean, deduplicate, write.

    DST/train/NAME.jsonl      {"text", "source", "title"}, one document per line
    DST/held_out/NAME.jsonl   the same for documents excluded from training
    DST/manifest.json         every file with its sha256 and counts, and counts of dropped text
    DST/LICENCES.md           every source, its licence and its package
    DST/licences/NAME/...     licence texts

The same recipe gives the same bytes. Memory holds the whole text: a few hundred megabytes for a
corpus of packages.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress, SilentProgress
from lowlat_lab.corpus.archive import read_members
from lowlat_lab.corpus.clean import KeptOut, Paragraphs, even_text
from lowlat_lab.corpus.document import Document
from lowlat_lab.corpus.extract import Extracted, extract
from lowlat_lab.corpus.fetch import Archive, fetch_archive
from lowlat_lab.corpus.output import Collected, CorpusSummary, write_corpus
from lowlat_lab.corpus.recipe import CorpusRecipe, Source
from lowlat_lab.corpus.wikitext import spell_as_wikitext


def collect_corpus(
    recipe: CorpusRecipe,
    destination: Path,
    *,
    without: Collection[str] = (),
    keep_out: Sequence[Path] = (),
    accept_newer: bool = False,
    progress: Progress | None = None,
) -> CorpusSummary:
    """Build the corpus in the folder `destination`, which appears complete or not at all.

    without: names of sources to leave out. keep_out: evaluation texts, whose paragraphs are removed
    from the corpus. accept_newer: if Debian has replaced the recipe's version of a package, take
    the current one; the manifest names it.

    Raises UserError for an unknown source name, an existing destination, and as `fetch_archive` and
    `extract`.
    """
    progress = progress if progress is not None else SilentProgress()
    if destination.exists():
        raise UserError(f"{destination} exists; give a folder that does not, or remove it")
    if unknown := set(without) - {source.name for source in recipe.source}:
        raise UserError(f"--without {min(unknown)}: the recipe has no source of this name")
    sources = [source for source in recipe.source if source.name not in without]
    evaluation = [_evaluation_text(path, recipe) for path in keep_out]
    # Fetch all archives first, so that a missing one is reported within seconds.
    archives = [
        fetch_archive(source, accept_newer=accept_newer, progress=progress) for source in sources
    ]
    collected = [
        _read(source, archive, recipe, progress)
        for source, archive in zip(sources, archives, strict=True)
    ]
    with progress.task("dropping what repeats", len(collected)) as task:
        paragraphs = Paragraphs(recipe.repeated_from)
        kept_out = KeptOut(evaluation, recipe.repeated_from)
        # exact match too, because text without spaces between words has few n-grams
        for text in evaluation:
            paragraphs.add(text)
        for one in collected:
            for document in one.extracted.held_out:
                paragraphs.add(document.text)
        for one in collected:
            _once(one.extracted, paragraphs, kept_out, one.source)
            if one.source.wikitext:
                both = spell_as_wikitext(one.extracted.train, one.extracted.held_out)
                one.extracted.train, one.extracted.held_out = both
            task.advance()
    return write_corpus(destination, recipe, collected, left_out=sorted(without))


def _read(source: Source, archive: Archive, recipe: CorpusRecipe, progress: Progress) -> Collected:
    """Documents and licence texts of one source."""
    members = read_members(archive.path, source.members, source.exclude)
    with progress.task(f"reading {source.name}", len(members)) as task:
        extracted = extract(source, members, plain_quotes=recipe.plain_quotes, task=task)
    files = source.licence.files
    licences = read_members(archive.path, files, ()) if files else []
    return Collected(source=source, archive=archive, extracted=extracted, licences=licences)


def _evaluation_text(path: Path, recipe: CorpusRecipe) -> str:
    """An evaluation text, normalised; every line is a paragraph."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--keep-out {path}: cannot be read as UTF-8 text ({error})") from error
    lines = (line.strip() for line in text.splitlines())
    return even_text("\n\n".join(line for line in lines if line), plain_quotes=recipe.plain_quotes)


def _once(extracted: Extracted, paragraphs: Paragraphs, kept_out: KeptOut, source: Source) -> None:
    """Remove repeated paragraphs and those of evaluation texts from the training documents, then
    apply the size limit.
    """
    kept: list[Document] = []
    for document in extracted.train:
        text, theirs = kept_out.without(document.text)
        extracted.drop("paragraphs of texts to keep out", theirs)
        text, dropped = paragraphs.without_seen(text)
        extracted.drop("paragraphs that repeat", dropped)
        if len(text) < source.min_chars:
            extracted.drop("documents of which too little is new")
        else:
            kept.append(replace(document, text=text))
    extracted.train = kept
    if source.max_megabytes is not None:
        _limit(extracted, int(source.max_megabytes * 1e6))


def _limit(extracted: Extracted, size: int) -> None:
    """Sample documents by content hash, up to `size` bytes; drop the others."""
    sizes = [len(document.text.encode()) for document in extracted.train]
    by_hash = sorted(range(len(sizes)), key=lambda i: _digest(extracted.train[i]))
    chosen = set[int]()
    total = 0
    for i in by_hash:
        if total + sizes[i] <= size:
            total += sizes[i]
            chosen.add(i)
    extracted.drop("documents over max_megabytes", len(sizes) - len(chosen))
    extracted.train = [document for i, document in enumerate(extracted.train) if i in chosen]


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode()).digest()
