"""Extraction of documents from an archive's members: format, cut, replace, drop, split, unwrap."""

import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import PurePosixPath

from lowlat.utils.errors import UserError
from lowlat.utils.progress import Task
from lowlat_lab.corpus.archive import gunzip
from lowlat_lab.corpus.clean import even_text, unwrapped, without_dropped
from lowlat_lab.corpus.document import Document, Member
from lowlat_lab.corpus.html_text import Selector, html_to_text
from lowlat_lab.corpus.mediawiki import mediawiki_documents
from lowlat_lab.corpus.r_data import read_texts
from lowlat_lab.corpus.recipe import Source
from lowlat_lab.corpus.reference import (
    dictionary_documents,
    factbook_documents,
    wordnet_documents,
)
from lowlat_lab.corpus.sword import sword_documents


@dataclass(kw_only=True, slots=True)
class Extracted:
    """Documents of a source, and the number of dropped paragraphs and documents by reason."""

    train: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str, count: int = 1) -> None:
        if count:
            self.dropped[reason] = self.dropped.get(reason, 0) + count


def extract(
    source: Source, members: Sequence[Member], *, plain_quotes: bool, task: Task
) -> Extracted:
    """All documents of a source; `task` is advanced once per member.

    Raises UserError for a member that is not in the source's format, and for a held_out glob
    without a match.
    """
    out = Extracted()
    held_out_seen = set[str]()
    for document in _documents(source, members, task):
        text, dropped = _shaped(source, even_text(document.text, plain_quotes=plain_quotes))
        out.drop("paragraphs that match drop", dropped)
        globs = [glob for glob in source.held_out if fnmatch.fnmatchcase(document.path, glob)]
        held_out_seen.update(globs)
        for piece in _split(source, text):
            if len(piece) < source.min_chars:
                out.drop(f"documents under {source.min_chars} characters")
                continue
            target = out.held_out if globs else out.train
            target.append(replace(document, text=piece, title=_title(document, piece, source)))
    if missing := set(source.held_out) - held_out_seen:
        raise UserError(f"source {source.name}: held_out matches no document: {min(missing)}")
    return out


def _documents(source: Source, members: Sequence[Member], task: Task) -> Iterator[Document]:
    if source.format == "r":
        yield from _r_documents(members)
        task.advance(len(members))
        return
    if source.format == "sword":
        yield from sword_documents(list(members))
        task.advance(len(members))
        return
    selectors = [tuple(map(Selector.parse, part)) for part in (source.root, source.skip)]
    for member in members:
        match source.format:
            case "html":
                page = html_to_text(_decoded(member, source), root=selectors[0], skip=selectors[1])
                yield Document(title=page.title, text=page.text, path=member.path)
            case "wordnet":
                yield from wordnet_documents(member)
            case "factbook":
                yield from factbook_documents(member)
            case "dictionary":
                yield from dictionary_documents(member)
            case "mediawiki":
                yield from mediawiki_documents(member)
            case "text":
                title = PurePosixPath(member.path).name.split(".")[0].replace("_", " ")
                yield Document(title=title, text=_decoded(member, source), path=member.path)
        task.advance()


def _r_documents(members: Sequence[Member]) -> Iterator[Document]:
    """The texts of lazy-load databases: each .rdx with the .rdb of the same name."""
    files = {member.path: member.data for member in members}
    for path, index in files.items():
        if not path.endswith(".rdx"):
            continue
        database = files.get(path[:-1] + "b")
        if database is None:
            raise UserError(f"{path} needs its .rdb file; add it to members")
        for name, lines in read_texts(index, database, path).items():
            yield Document(title=name, text="\n".join(lines), path=f"{path}/{name}")


def _decoded(member: Member, source: Source) -> str:
    """Text of a member. An HTML page that declares iso-8859-1, as old manuals do, is latin-1."""
    data = gunzip(member) if member.path.endswith(".gz") else member.data
    encoding = source.encoding
    if source.format == "html" and re.search(rb"charset=[\"']?iso-8859-1", data[:2000], re.I):
        encoding = "latin-1"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(
            f"source {source.name}: {member.path} is not {encoding} (byte {error.start}); set "
            "encoding, or exclude it"
        ) from error


def _shaped(source: Source, text: str) -> tuple[str, int]:
    """The text after start, stop, replace, drop and unwrap; the number of dropped paragraphs."""
    if source.start and (match := re.search(source.start, text, re.MULTILINE)):
        text = text[match.start() :]
    if source.stop and (match := re.search(source.stop, text, re.MULTILINE)):
        text = text[: match.start()]
    for pattern, replacement in source.replace:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    text = re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip("\n")
    patterns = [re.compile(pattern, re.MULTILINE) for pattern in source.drop]
    text, dropped = without_dropped(text, patterns) if patterns else (text, 0)
    return (unwrapped(text) if source.unwrap else text), dropped


def _split(source: Source, text: str) -> list[str]:
    if source.split is None:
        return [text]
    starts = [match.start() for match in re.finditer(source.split, text, re.MULTILINE)]
    edges = sorted({0, *starts, len(text)})
    return [text[start:end].strip("\n") for start, end in pairwise(edges)]


def _title(document: Document, piece: str, source: Source) -> str:
    """Title of a piece: that of the document and, if it was split, the piece's first line."""
    if source.split is None:
        return document.title
    return f"{document.title}: {piece.split(chr(10), 1)[0][:80]}"
