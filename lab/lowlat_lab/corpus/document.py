"""Records of the collection: a file of a package, a document of a corpus."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """A file inside an archive."""

    path: str
    """Path inside the archive, with forward slashes and no leading './'."""
    data: bytes
    """Content of the file."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """A self-contained text: a chapter, a page, a speech, an entry."""

    title: str
    """Its common name; not part of the text."""
    text: str
    """Paragraphs with an empty line between them."""
    path: str
    """Path of its member."""
