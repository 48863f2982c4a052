"""MediaWiki XML exports (Wikipedia dumps) to plain text articles.

`mwparserfromhell` parses the wiki markup. The XML is that of `pages-articles` dumps (export-0.10,
mediawiki.org/xml), plain or compressed by bzip2.
"""

import bz2
import io
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from lowlat.utils.errors import UserError
from lowlat_lab.corpus.archive import MAX_MEMBER
from lowlat_lab.corpus.document import Document, Member

UNSEEN_TAGS = {"ref", "references", "table", "math", "chem", "ce", "gallery", "timeline", "score"}
UNSEEN_TAGS |= {"imagemap", "graph", "hiero", "templatedata", "categorytree", "inputbox", "style"}
UNSEEN_TAGS |= {"syntaxhighlight", "source", "pre"}
"""Elements to leave out, because they are not prose."""
UNSEEN_LINKS = re.compile(r"\s*(?:(?i:file|image|category):|[a-z]{2,3}(?:-[a-z]+)?:(?=\S))")
"""Links to leave out: images, categories, other languages. A leading colon makes them text."""
KEPT = {"lang": 1, "nowrap": 0, "quote": 0, "blockquote": 0, "cquote": 0, "transl": -1}
"""Templates that are part of a sentence, and the number of the argument with their text."""
UNITS = {"convert", "cvt"}
JOINING = {"to", "and", "or", "by", "x", "-", "–", "to(-)", "+/-"}  # noqa: RUF001
"""Words between two numbers with one unit, as in {{convert|60|to|70|km}}."""
CLOSING = re.compile(
    r"^(?:see also|notes?|footnotes|references|citations|sources|(?:selected )?bibliography|"
    r"further reading|external links|notes and references|gallery)$",
    re.IGNORECASE,
)
"""Headings of sections to leave out: references, notes, links."""


def mediawiki_documents(member: Member) -> Iterator[Document]:
    """The articles (namespace 0) of an export, without redirects, tables, notes and templates.

    Raises UserError for a file that is not an export, is damaged or too large, and if
    mwparserfromhell is not installed.
    """
    try:
        import mwparserfromhell
    except ImportError as error:
        raise UserError(
            f"{member.path}: wiki markup needs mwparserfromhell; pip install mwparserfromhell"
        ) from error
    found = False
    for space, page in _pages(member):
        found = True
        title = page.findtext(f"{space}title") or ""
        # exports before version 0.6 have no namespaces
        is_article = page.findtext(f"{space}ns") in ("0", None)
        if is_article and page.find(f"{space}redirect") is None:
            markup = page.findtext(f"{space}revision/{space}text") or ""
            text = f"{title}\n\n{_article(mwparserfromhell.parse(markup))}"
            yield Document(title=title, text=text, path=f"{member.path}/{title}")
    if not found:
        raise UserError(f"{member.path} is not a MediaWiki XML export (it has no page)")


def _pages(member: Member) -> Iterator[tuple[str, ElementTree.Element]]:
    """Every page, with the prefix of its tags. The next iteration clears the page."""
    elements = ElementTree.iterparse(io.BytesIO(_decompressed(member)))
    while True:
        try:
            _, element = next(elements)
        except StopIteration:
            return
        except (ElementTree.ParseError, LookupError, ValueError) as error:
            raise UserError(f"{member.path} is not a MediaWiki XML export ({error})") from error
        space, _, name = element.tag.rpartition("}")
        if name == "page" and space.startswith("{http://www.mediawiki.org/xml/export-"):
            yield space + "}", element
            element.clear()


def _decompressed(member: Member) -> bytes:
    """All streams of a .bz2 file, or the content of any other."""
    if not member.path.endswith(".bz2"):
        return member.data
    parts: list[bytes] = []
    left, rest = MAX_MEMBER, member.data
    while rest or not parts:
        stream = bz2.BZ2Decompressor()
        try:
            parts.append(stream.decompress(rest, left))
        except OSError as error:
            raise UserError(f"{member.path} is not complete bzip2 data ({error})") from error
        left, rest = left - len(parts[-1]), stream.unused_data
        if not stream.eof or (rest and left <= 0):
            raise UserError(f"{member.path} is cut short, or over {MAX_MEMBER} bytes decompressed")
    return b"".join(parts)


def _article(code: Any) -> str:
    """Paragraphs, headings and lists of an article, without sections of references."""
    text = _text(code)
    lines = [" ".join(line.split()) for line in re.sub("'{2,}", "", text).split("\n")]
    # Remove rows of unclosed tables, and list items that contained only a template.
    lines = [re.sub("^(?:- )+(?=- )", "", line) for line in lines]
    lines = [line for line in lines if not re.match(r"\{\||[|!]|(?:- )?-$", line)]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines))
    # Remove brackets that contained only a note, a sound or a template.
    text = re.sub(r"\((?:[\s,;:/]|\bor\b)*\)", "", text)
    text = re.sub(r"\((?:[,;:] *)+", "(", text)
    text = re.sub(r"(?<=\S) +(?= |[,;)]|[.:](?:\s|$))", "", text)
    return text.strip()


def _text(code: Any) -> str:
    """Visible text of `code`, without sections of references and their subsections."""
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
            return str(node.normalize()).encode(errors="replace").decode()
        case "Wikilink":
            target = str(node.title)
            if UNSEEN_LINKS.match(target):
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
            if tag in UNSEEN_TAGS:
                return ""
            contents = _text(node.contents) if node.contents else ""
            return f"- {contents}" if tag == "li" else contents
        case _:  # comments and parameters of templates
            return ""


def _template(node: Any) -> str:
    """Text of a template that is part of a sentence; "" for other templates."""
    written = str(node.name).strip().replace("_", " ")
    name = written.lower()
    words = [_text(part.value).strip() for part in node.params if not part.showkey]
    if name in UNITS:
        return " ".join(words[: 4 if words[1:2] and words[1] in JOINING else 2])
    if name == "as of" and words:
        return f"{written} {words[0]}"
    place = KEPT.get(name)
    if place is None or place >= len(words) or not words:
        return ""
    return words[place]
