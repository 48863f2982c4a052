"""SWORD modules to text: compressed Bibles and commentaries (zText, zCom, and long forms).

For each testament a module has an index of verses (.?zv: block, start, size), an index of blocks
(.?zs: offset, size, decompressed size) and the blocks, zlib streams of OSIS markup (.?zz). Titles
of books come from the markup.
"""

import html
import re
import struct
import zlib
from collections.abc import Iterator

from lowlat.utils.errors import UserError
from lowlat_lab.corpus.document import Document, Member

MAX_BLOCK = 64 << 20

NAME = re.compile(r'<milestone n="([^"]+)" type="x-usfm-(?:h|toc2|toc1)"/>')
CHAPTER = re.compile(r'<chapter [^>]*\bosisID="([^".]+)\.(\d+)"[^>]*\bsID=[^>]*>')
LEFT_OUT = re.compile(r"<(note|rdg)\b[^>]*(?<!/)>.*?</\1>", re.DOTALL)
TITLE = re.compile(r"<title\b[^>]*>(.*?)</title>", re.DOTALL)
PARAGRAPH = re.compile(
    r'<div\b[^>]*\btype="(?:x-)?(?:p|paragraph|section|introduction|book|chapter)"[^>]*>'
    r"|</?(?:p|lg|list|table)\b[^>]*>|<lb\b[^>]*type=\"x-(?:begin|end)-paragraph\"[^>]*>"
)
LINE = re.compile(r"</?l\b[^>]*>|<lb\b[^>]*>|</?(?:item|row)\b[^>]*>")
TAG = re.compile(r"<[^>]*>")


def sword_documents(members: list[Member]) -> Iterator[Document]:
    """One document per book or chapter, in the order of the module. A block without a new name
    continues the previous document.

    members: the three files of one or both testaments. Raises UserError if one is missing or
    damaged.
    """
    files = {member.path: member.data for member in members}
    verses = sorted(path for path in files if re.search(r"\.[abcrv]?zv$", path))
    if not verses:
        raise UserError("a SWORD module needs its .bzv, .bzs and .bzz files among the members")
    # reversed, because the Old Testament ('ot') precedes the New ('nt')
    for path in sorted(verses, reverse=True):
        try:
            yield from _testament(path, files)
        except (KeyError, struct.error, zlib.error, IndexError, ValueError) as error:
            raise UserError(f"{path} is not a complete SWORD module ({error})") from error


def _testament(path: str, files: dict[str, bytes]) -> Iterator[Document]:
    packed = files[path[:-1] + "z"]
    blocks = list(struct.iter_unpack("<III", files[path[:-1] + "s"]))
    places: dict[int, list[tuple[int, int]]] = {}
    for number, at, length in _entries(files[path], files[path[:-1] + "s"]):
        places.setdefault(number, []).append((at, length))
    title, parts = "", list[str]()
    for number, texts in places.items():
        start, size, _ = blocks[number]
        stream = zlib.decompressobj()
        block = stream.decompress(packed[start : start + size], MAX_BLOCK)
        if not stream.eof:
            raise ValueError(f"block {number} is cut short or over {MAX_BLOCK} bytes")
        pieces = (block[at : at + length] for at, length in texts)
        markup = b"".join(pieces).decode("utf-8", "replace")
        name = _name(markup)
        if name or not parts:
            yield from _document(title, parts, path)
            title, parts = name, []
        parts.append(osis_to_text(markup))
    yield from _document(title, parts, path)


def _document(title: str, parts: list[str], path: str) -> Iterator[Document]:
    text = "\n\n".join(part for part in parts if part)
    if text:
        yield Document(title=title, text=text, path=f"{path}/{title}")


def _name(markup: str) -> str:
    """Title of a block: the last name before its first chapter, or else that chapter.

    A preface may precede the book's own name, and a glossary may follow its last chapter.
    """
    chapter = CHAPTER.search(markup)
    if names := NAME.findall(markup[: chapter.start() if chapter else len(markup)]):
        return html.unescape(names[-1])
    return f"{chapter[1]} {chapter[2]}" if chapter else ""


def _entries(verses: bytes, blocks: bytes) -> list[tuple[int, int, int]]:
    """(block, start, size) of every text, without duplicates: verses may share a comment.

    Entries have 10 bytes, or 12 in the long format. If the length of the index is a multiple of
    both, the format is the one whose block numbers all exist.
    """
    wide = len(verses) % 10 != 0
    if len(verses) % 60 == 0:
        count = len(blocks) // 12
        wide = all(block < count for block, _, _ in struct.iter_unpack("<III", verses))
    form = "<III" if wide else "<IIH"
    seen: dict[tuple[int, int, int], None] = {}
    for place in struct.iter_unpack(form, verses):
        if place[2]:
            seen[place] = None
    return list(seen)


def osis_to_text(markup: str) -> str:
    """Convert OSIS markup to paragraphs with an empty line between them, without notes."""
    text = LEFT_OUT.sub(" ", re.sub(r"\s+", " ", markup))
    text = CHAPTER.sub(r"\n\nChapter \2\n\n", text)
    text = TITLE.sub(r"\n\n\1\n\n", text)
    text = PARAGRAPH.sub("\n\n", text)
    # An end tag and the next start tag are one line break.
    text = re.sub(r" *\v[ \v]*", "\v", LINE.sub("\v", text))
    text = html.unescape(TAG.sub("", text))
    paragraphs: list[str] = []
    for paragraph in re.split(r"\s*\n\s*\n\s*", text):
        lines = (" ".join(line.split()) for line in paragraph.split("\v"))
        paragraph = re.sub(r" +(?=[,.;:!?])", "", "\n".join(line for line in lines if line))
        # A title may repeat the chapter's name.
        if paragraph and paragraphs[-1:] != [paragraph]:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
