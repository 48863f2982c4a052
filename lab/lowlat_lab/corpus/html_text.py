"""HTML to plain text: headings, paragraphs, lists, code and tables, without navigation.

Selectors of the recipe choose the content of a page. `html.parser` accepts missing end tags and
invalid attributes, as browsers do.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html.parser import HTMLParser

HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
BLOCKS = HEADINGS | {"p", "div", "section", "article", "main", "blockquote", "dt", "dd", "dl", "ul"}
BLOCKS |= {"ol", "li", "pre", "table", "caption", "tr", "figure", "figcaption", "header", "hr"}
BLOCKS |= {"address", "details", "summary", "body", "center", "form", "fieldset", "aside"}
NEVER = {"script", "style", "head", "svg", "math", "nav", "button", "select", "template"}
NEVER |= {"object", "iframe", "canvas", "audio", "video", "textarea", "noscript", "footer"}
VOID = {"br", "hr", "img", "input", "link", "meta", "area", "base", "col", "embed", "source"}
VOID |= {"track", "param", "wbr"}


@dataclass(frozen=True, slots=True)
class Selector:
    """A CSS selector: `tag`, `.class`, `#id`, `tag.class` or `tag#id`."""

    tag: str
    name: str
    id: str

    @classmethod
    def parse(cls, text: str) -> "Selector":
        """Parse `text`. Raises ValueError if it is none of the five forms."""
        match = re.fullmatch(r"([a-z][a-z0-9]*)?(?:\.([\w-]+)|#([\w.-]+))?", text)
        if not text or match is None:
            raise ValueError(f"'{text}' is not tag, .class, #id, tag.class or tag#id")
        return cls(*(part or "" for part in match.groups()))

    def matches(self, tag: str, attributes: dict[str, str]) -> bool:
        return (
            self.tag in ("", tag)
            and (not self.name or self.name in attributes.get("class", "").split())
            and self.id in ("", attributes.get("id", ""))
        )


@dataclass(frozen=True, slots=True)
class Page:
    """A rendered page."""

    title: str
    """Text of its title element."""
    text: str
    """Blocks with an empty line between them, except between list items and between table rows."""


def html_to_text(html: str, *, root: Sequence[Selector], skip: Sequence[Selector]) -> Page:
    """The content of a page.

    root: content elements; if the page has none of them, the whole page is content. skip: elements
    to leave out, with everything inside them.
    """
    renderer = _Renderer(root, skip)
    renderer.feed(html)
    renderer.close()
    if root and not renderer.found_root:
        return html_to_text(html, root=(), skip=skip)
    return Page(" ".join("".join(renderer.title).split()), renderer.finished())


class _Span:
    """Tracks whether the parser is inside an element, by counting its start and end tags."""

    def __init__(self) -> None:
        self.tag = ""
        self.depth = 0

    def open(self, tag: str) -> None:
        self.tag, self.depth = tag, 1

    def start(self, tag: str) -> None:
        self.depth += tag == self.tag

    def end(self, tag: str) -> None:
        self.depth -= tag == self.tag and self.depth > 0

    def __bool__(self) -> bool:
        return self.depth > 0


class _Renderer(HTMLParser):
    """HTML parser that collects the blocks (kind, text) of a page."""

    def __init__(self, root: Sequence[Selector], skip: Sequence[Selector]) -> None:
        super().__init__(convert_charrefs=True)
        self.root, self.skip = root, skip
        self.found_root = not root
        self.title: list[str] = []
        self.blocks: list[tuple[str, str]] = []
        self._pieces: list[str] = []
        self._kind = "p"
        self._lists: list[int | None] = []  # one per open list: the next number, None for bullets
        self._skipped, self._inside, self._pre = _Span(), _Span(), _Span()
        self._in_title = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        self._in_title = tag == "title" and not self.title
        if self._skipped:
            return self._skipped.start(tag)
        if tag not in VOID and (tag in NEVER or _any(self.skip, tag, attributes)):
            return self._skipped.open(tag)
        if self._inside:
            self._inside.start(tag)
        elif self.root and _any(self.root, tag, attributes):
            self._inside.open(tag)
            self.found_root = True
        if self._pre:
            self._pre.start(tag)
        self._open(tag)

    def _open(self, tag: str) -> None:
        """Start a content element: begin a block, a line or a table cell."""
        if tag == "br":
            self._pieces.append("\n")
        if tag in ("td", "th") and self._kind == "row":
            self._pieces.append("\v")  # separates cells until white space is normalised
        if tag not in BLOCKS:
            return
        # A paragraph at the start of an item or cell is part of it.
        if self._kind in ("li", "row", "dd") and tag in ("p", "div") and not self._has_text():
            return
        if self._kind == "row" and tag != "tr" and tag != "pre":
            self._pieces.append(" ")
            return
        self._flush()
        self._kind = {"pre": "pre", "li": "li", "dd": "dd", "dt": "dt", "tr": "row"}.get(tag, "p")
        if tag in HEADINGS:
            self._kind = "h"
        if tag in ("ul", "ol"):
            self._lists.append(1 if tag == "ol" else None)
        if tag == "pre":
            self._pre.open(tag)

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False
        if self._skipped:
            return self._skipped.end(tag)
        if tag in BLOCKS and not (self._kind == "row" and tag not in ("tr", "table", "pre")):
            self._flush()
            self._kind = "p"
            if tag in ("ul", "ol") and self._lists:
                self._lists.pop()
        self._pre.end(tag)
        self._inside.end(tag)

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.title.append(data)
        elif not self._skipped and (self._inside or not self.root):
            self._pieces.append(data if self._pre else re.sub(r"\s+", " ", data))

    def _has_text(self) -> bool:
        return any(not piece.isspace() for piece in self._pieces)

    def _flush(self) -> None:
        """End the current block."""
        text = "".join(self._pieces)
        self._pieces = []
        if self._kind == "pre":
            text = text.expandtabs(4).strip("\n").rstrip()
        elif self._kind == "row":
            cells = (" ".join(cell.split()) for cell in text.split("\v"))
            text = " | ".join(cell for cell in cells if cell)
        else:
            lines = (" ".join(line.split()) for line in text.split("\n"))
            text = "\n".join(line for line in lines if line)
        if not text.strip():
            return
        if self._kind == "li":
            text = self._marker() + text
        self.blocks.append((self._kind, text))

    def _marker(self) -> str:
        """Bullet or number of a list item, indented by the depth of its list."""
        indent = "  " * max(0, len(self._lists) - 1)
        if not self._lists or self._lists[-1] is None:
            return f"{indent}- "
        number = self._lists[-1]
        self._lists[-1] = number + 1
        return f"{indent}{number}. "

    def finished(self) -> str:
        """All blocks as one text."""
        self._flush()
        parts: list[str] = []
        before = ""
        for kind, text in self.blocks:
            if kind == "pre":
                text = "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
            tight = (kind == before and kind in ("li", "row")) or (before == "dt" and kind == "dd")
            parts += ["\n" if tight else "\n\n", text]
            before = kind
        return "".join(parts[1:])


def _any(selectors: Sequence[Selector], tag: str, attributes: dict[str, str]) -> bool:
    return any(selector.matches(tag, attributes) for selector in selectors)
