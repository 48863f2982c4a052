"""Output folder of a corpus: documents, manifest and licences, complete or not at all.

The written bytes depend on the collected documents only.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowlat.utils.atomic_files import sync_folder, write_new_file
from lowlat.utils.disk_errors import NO_SPACE
from lowlat.utils.errors import UserError
from lowlat_lab.corpus.document import Document, Member
from lowlat_lab.corpus.extract import Extracted
from lowlat_lab.corpus.fetch import Archive
from lowlat_lab.corpus.recipe import CorpusRecipe, Source

FORMAT = 1
"""Version of the folder's layout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collected:
    """Documents and licence texts of a source, and its archive."""

    source: Source
    archive: Archive
    """Its package archive."""
    extracted: Extracted
    licences: list[Member]
    """Licence files of the archive."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceSummary:
    """Counts of one source."""

    name: str
    licence: str
    documents: int
    train_bytes: int
    """UTF-8 bytes of the training documents' texts."""
    held_out_bytes: int
    dropped: dict[str, int]
    """Number of dropped paragraphs and documents by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSummary:
    """The written folder and its sources."""

    folder: Path
    sources: tuple[SourceSummary, ...]

    @property
    def train_bytes(self) -> int:
        return sum(source.train_bytes for source in self.sources)


def write_corpus(
    destination: Path, recipe: CorpusRecipe, collected: Sequence[Collected], left_out: Sequence[str]
) -> CorpusSummary:
    """Write the folder under a temporary name, then rename it to `destination`."""
    part = destination.with_name(f".{destination.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write_folder(part, recipe, collected, left_out)
        os.replace(part, destination)
        sync_folder(destination.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        what = "no space left" if error.errno in NO_SPACE else os.strerror(error.errno or 0)
        raise UserError(
            f"{destination} cannot be written ({what}); give a folder on a disk with free space"
        ) from error
    return CorpusSummary(folder=destination, sources=tuple(map(_summary, collected)))


def _write_folder(
    part: Path, recipe: CorpusRecipe, collected: Sequence[Collected], left_out: Sequence[str]
) -> None:
    manifest = {
        "format": FORMAT,
        "name": recipe.name,
        "train_bytes": sum(_bytes_of(one.extracted.train) for one in collected),
        "left_out_sources": list(left_out),
        "sources": [_write_source(part, one) for one in collected],
    }
    _write(part / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    _write(part / "LICENCES.md", licence_list(recipe, collected))


def _write_source(folder: Path, one: Collected) -> dict[str, Any]:
    """Write the documents and licences of a source. Returns its entry in the manifest."""
    source = one.source
    files = {}
    for split, documents in (("train", one.extracted.train), ("held_out", one.extracted.held_out)):
        if documents:
            path = folder / split / f"{source.name}.jsonl"
            files[f"{split}/{path.name}"] = _write_documents(path, documents, source.name)
    names = []
    for member in one.licences:
        # A flat name, because a path in an archive may point outside the folder.
        name = member.path.replace("/", "_").replace("\\", "_").lstrip(".")
        _write(folder / "licences" / source.name / name, member.data)
        names.append(f"licences/{source.name}/{name}")
    return {
        "name": source.name,
        "about": source.about,
        "package": source.package,
        "archive": one.archive.path.name,
        "archive_sha256": one.archive.sha256,
        "licence": source.licence.name,
        "licence_files": names,
        "files": files,
        "dropped": dict(sorted(one.extracted.dropped.items())),
    }


def _write_documents(path: Path, documents: Sequence[Document], source: str) -> dict[str, Any]:
    lines = []
    for document in documents:
        record = {"text": document.text, "source": source, "title": document.title}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    data = "".join(lines).encode()
    _write(path, data)
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "documents": len(documents),
        "text_bytes": _bytes_of(documents),
        "file_bytes": len(data),
    }


def _bytes_of(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _write(path: Path, content: str | bytes) -> None:
    """Write a file and sync it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_new_file(path, [content.encode() if isinstance(content, str) else content])


def _summary(one: Collected) -> SourceSummary:
    return SourceSummary(
        name=one.source.name,
        licence=one.source.licence.name,
        documents=len(one.extracted.train),
        train_bytes=_bytes_of(one.extracted.train),
        held_out_bytes=_bytes_of(one.extracted.held_out),
        dropped=one.extracted.dropped,
    )


def licence_list(recipe: CorpusRecipe, collected: Sequence[Collected]) -> str:
    """LICENCES.md: licence, its source, attribution and package of each source."""
    blocks = [
        f"# Licences of the corpus {recipe.name}",
        "Each file holds the text of one source under that source's own licence. The texts were "
        "extracted from the packages named here. Markup, repeated paragraphs and what is listed as "
        "left out were removed, white space and typography were normalised, no word was changed.",
    ]
    for one in collected:
        source, licence = one.source, one.source.licence
        lines = [f"## {source.name}", "", source.about, ""]
        lines += [
            f"- package: `{source.package}`, archive `{one.archive.path.name}`, "
            f"sha256 `{one.archive.sha256}`"
        ]
        lines += [f"- licence: {licence.name}"]
        lines += [f"- stated in: {licence.says}"]
        if licence.holder:
            lines += [f"- attribution: {licence.holder}"]
        if one.licences:
            lines += [f"- licence text: `licences/{source.name}/`"]
        if dropped := sorted(one.extracted.dropped.items()):
            lines += ["- left out: " + "; ".join(f"{count} {why}" for why, count in dropped)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"
