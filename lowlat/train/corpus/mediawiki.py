"""Articles of a MediaWiki XML export (Wikipedia's dumps) as plain text.

Owns what each piece of wiki markup becomes; `mwparserfromhell` tells the pieces apart. The XML is
export-0.10's (mediawiki.org/xml), as `pages-articles` dumps have it, plain or in bzip2.
"""

import bz2
import io
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from lowlat.train.corpus.archive import MAX_MEMBER
from lowlat.train.corpus.document import Document, Member
from lowlat.utils.errors import UserError

NEVER = {"ref", "references", "table", "math", "chem", "ce", "gallery", "timeline", "score"}
NEVER |= {"imagemap", "graph", "hiero", "templatedata", "categorytree", "inputbox", "style"}
LISTS = {"li": "- ", "dt": "", "dd": ""}
KEPT = {"lang": 1, "nowrap": 0, "quote": 0, "blockquote": 0, "cquote": 0, "as of": 0, "transl": -1}
"""Templates that are words of the sentence they stand in, and which argument holds the words."""
UNITS = {"convert", "cvt"}
CLOSING = re.compile(
    r"^(?:see also|notes?|footnotes|references|citations|sources|(?:selected )?bibliography|"
    r"further reading|external links|notes and references|gallery)$",
    re.IGNORECASE,
)
"""Sections of an article that are lists of other texts."""


def mediawiki_documents(member: Member) -> Iterator[Document]:
    """The articles (namespace 0) of an export, without redirects, tables, notes and templates.

    Raises UserError: the file is no such export, is damaged or too large, and where
    mwparserfromhell is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError as error:
        raise UserError(
            f"{member.path}: wiki markup needs mwparserfromhell; pip install mwparserfromhell"
        ) from error
    found = False
    try:
        for _, page in ElementTree.iterparse(io.BytesIO(_decompressed(member))):
            space, _, name = page.tag.rpartition("}")
            if name != "page" or not space.startswith("{http://www.mediawiki.org/xml/export-"):
                continue
            found = True
            space += "}"
            markup = page.findtext(f"{space}revision/{space}text") or ""
            title = page.findtext(f"{space}title") or ""
            is_article = page.findtext(f"{space}ns") == "0"
            if is_article and page.find(f"{space}redirect") is None:
                text = f"{title}\n\n{_article(mwparserfromhell.parse(markup))}"
                yield Document(title=title, text=text, path=f"{member.path}/{title}")
            page.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{member.path} is not a MediaWiki XML export ({error})") from error
    if not found:
        raise UserError(f"{member.path} is not a MediaWiki XML export (it has no page)")


def _decompressed(member: Member) -> bytes:
    if not member.path.endswith(".bz2"):
        return member.data
    stream = bz2.BZ2Decompressor()
    try:
        data = stream.decompress(member.data, MAX_MEMBER)
    except OSError as error:
        raise UserError(f"{member.path} is not whole bzip2 data ({error})") from error
    if not stream.eof:
        raise UserError(f"{member.path} is cut short, or over {MAX_MEMBER} bytes decompressed")
    return data


def _article(code: Any) -> str:
    """Paragraphs, headings and lists of an article, up to its lists of other texts."""
    text = _text(code)
    lines = [" ".join(line.split()) for line in re.sub("'{2,}", "", text).split("\n")]
    # Rows of a table that its article never closes, and list items that held only a template.
    lines = [line for line in lines if not re.match(r"\{\||[|!]|-$", line)]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    # What a note, a sound or a template leaves behind in brackets.
    text = re.sub(r"\((?:[\s,;:/]|\bor\b)*\)", "", text)
    text = re.sub(r"\((?:[,;:] *)+", "(", text)
    text = re.sub(r"(?<=\S) +(?=[ ,.;:)])", "", text)
    return text.strip()


def _text(code: Any) -> str:
    """What a reader sees of `code`. A section of other texts is left out with all below it."""
    pieces: list[str] = []
    closed: int | None = None
    for node in code.nodes:
        kind = type(node).__name__
        if kind == "Heading":
            title = _text(node.title).strip()
            if closed is not None and node.level > closed:
                continue
            closed = node.level if CLOSING.match(title) else None
            pieces.append("" if closed else f"\n\n{title}\n\n")
        elif closed is None:
            pieces.append(_piece(node, kind))
    return "".join(pieces)


def _piece(node: Any, kind: str) -> str:
    match kind:
        case "Text":
            return str(node.value)
        case "HTMLEntity":
            return str(node.normalize())
        case "Wikilink":
            target = str(node.title)
            # Pictures and categories; a leading colon makes a link to one, which is text.
            if re.match(r"\s*(?:file|image|category|[a-z]{2,3}(?:-[a-z]+)?):", target, re.I):
                return ""
            return _text(node.text) if node.text else target.lstrip(":")
        case "ExternalLink":
            return _text(node.title) if node.title else ("" if node.brackets else str(node.url))
        case "Template":
            return _template(node)
        case "Tag":
            tag = str(node.tag).strip().lower()
            if tag == "br":
                return "\n"
            if tag in NEVER:
                return ""
            return LISTS.get(tag, "") + (_text(node.contents) if node.contents else "")
        case _:  # comments and parameters of templates
            return ""


def _template(node: Any) -> str:
    name = str(node.name).strip().lower().replace("_", " ")
    words = [_text(part.value).strip() for part in node.params if not part.showkey]
    if name in UNITS and len(words) > 1:
        return " ".join(words[:2])
    place = KEPT.get(name)
    if place is None or place >= len(words) or not words:
        return ""
    return words[place]
