"""SWORD modules to text: compressed Bibles and commentaries (zText, zCom, and long forms).

A module keeps, per testament, an index of verses (.?zv: block, start, size), an index of blocks
(.?zs: offset, size, size decompressed) and the blocks, zlib streams of OSIS markup (.?zz). Owns
that layout and what each OSIS element becomes as text; titles of books come from the text itself.
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
    """One document per block (a book or a chapter), in the order of the module; a block that begins
    neither, a piece of a chapter, belongs to the one before.

    members: the three files of one or both testaments. Raises UserError where one is missing or
    damaged.
    """
    files = {member.path: member.data for member in members}
    verses = sorted(path for path in files if re.search(r"\.[abcrv]?zv$", path))
    if not verses:
        raise UserError("a SWORD module needs its .bzv, .bzs and .bzz files among the members")
    # 'ot' sorts after 'nt', and is read first.
    for path in sorted(verses, reverse=True):
        try:
            yield from _testament(path, files)
        except (KeyError, struct.error, zlib.error, IndexError, ValueError) as error:
            raise UserError(f"{path} is not a whole part of a SWORD module ({error})") from error


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
    """What a block is called: the last name before its first chapter, or that chapter.

    A preface may come before the book's own name, and a glossary after its last chapter.
    """
    chapter = CHAPTER.search(markup)
    if names := NAME.findall(markup[: chapter.start() if chapter else len(markup)]):
        return html.unescape(names[-1])
    return f"{chapter[1]} {chapter[2]}" if chapter else ""


def _entries(verses: bytes, blocks: bytes) -> list[tuple[int, int, int]]:
    """(block, start, size) of every text, once: verses that share a comment share its place.

    Sizes take two bytes, or four in the long forms. The index's length tells which; where it
    divides by both, only one reading has none but existing blocks.
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
    """OSIS markup as paragraphs with an empty line between them; notes are left out."""
    text = LEFT_OUT.sub(" ", re.sub(r"\s+", " ", markup))
    text = CHAPTER.sub(r"\n\nChapter \2\n\n", text)
    text = TITLE.sub(r"\n\n\1\n\n", text)
    text = PARAGRAPH.sub("\n\n", text)
    # A line of verse ends where the next begins: both marks together are one end.
    text = re.sub(r" *\v[ \v]*", "\v", LINE.sub("\v", text))
    text = html.unescape(TAG.sub("", text))
    paragraphs: list[str] = []
    for paragraph in re.split(r"\s*\n\s*\n\s*", text):
        lines = (" ".join(line.split()) for line in paragraph.split("\v"))
        paragraph = re.sub(r" +(?=[,.;:!?])", "", "\n".join(line for line in lines if line))
        # A title that says what the chapter's mark has said already stands once.
        if paragraph and paragraphs[-1:] != [paragraph]:
            paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)
