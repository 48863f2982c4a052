"""Text normalisation (Unicode NFC, whitespace, control characters) and paragraph deduplication."""

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise

# Invisible characters: soft hyphen, zero width, direction marks, byte order mark.
INVISIBLE = dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, *range(0x200E, 0x2010)])
INVISIBLE |= dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFFFD])
CONTROL = dict.fromkeys(c for c in [*range(0x20), *range(0x7F, 0xA0)] if chr(c) not in "\n\t")
SPACES = dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
LINE_ENDS = {0x2028: "\n", 0x2029: "\n\n", 0x85: "\n"}
TABLE = {**CONTROL, **INVISIBLE, **SPACES, **LINE_ENDS}
PLAIN_QUOTES = {0x2018: "'", 0x2019: "'", 0x201A: "'", 0x201B: "'", 0x201C: '"', 0x201D: '"'}
PLAIN_QUOTES |= {0x201E: '"', 0x201F: '"', 0x2010: "-", 0x2011: "-", 0x2026: "..."}

RUN, SHARE = 5, 0.25
"""Words of an n-gram; largest share of a paragraph's n-grams that an evaluation text may have."""


def even_text(text: str, *, plain_quotes: bool) -> str:
    """Normalise `text`: Unicode NFC, line feeds, no control or invisible characters, no spaces at
    line ends, at most one empty line between paragraphs.

    plain_quotes: typographic quotes, hyphens and ellipses become ASCII.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(TABLE)
    if plain_quotes:
        text = text.translate(PLAIN_QUOTES)
    text = unicodedata.normalize("NFC", text).expandtabs(4)
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n").rstrip()


def unwrapped(text: str) -> str:
    """Undo line wrapping: one line per paragraph, except indented ones (verse, code, lists).

    A paragraph counts as wrapped if most of its lines have no space for the first word of the next
    line.
    """
    return "\n\n".join(map(_joined, text.split("\n\n")))


def _joined(paragraph: str) -> str:
    lines = paragraph.split("\n")
    if len(lines) < 2 or any(line.startswith((" ", "- ", "* ")) for line in lines[1:]):
        return paragraph
    width = max(map(len, lines))
    lengths = [len(line) + 1 + len(after.split(" ", 1)[0]) for line, after in pairwise(lines)]
    full = sum(length > min(width, 60) for length in lengths)
    return " ".join(line.strip() for line in lines) if full >= len(lengths) * 0.7 else paragraph


def without_dropped(text: str, patterns: Sequence[re.Pattern[str]]) -> tuple[str, int]:
    """`text` without the paragraphs that contain a pattern, and the number of those removed."""
    paragraphs = text.split("\n\n")
    kept = [part for part in paragraphs if not any(pattern.search(part) for pattern in patterns)]
    return "\n\n".join(kept), len(paragraphs) - len(kept)


class Paragraphs:
    """Paragraph deduplication: the paragraphs of at least `shortest` characters seen so far.

    Shorter ones may repeat. Case, punctuation and white space are ignored.
    """

    def __init__(self, shortest: int) -> None:
        self.shortest = shortest
        self._seen: set[bytes] = set()

    def add(self, text: str) -> None:
        """Mark every paragraph of `text` as seen."""
        self.without_seen(text)

    def without_seen(self, text: str) -> tuple[str, int]:
        """`text` without paragraphs seen before, and the number removed. Marks the rest as seen."""
        kept: list[str] = []
        dropped = 0
        for paragraph in text.split("\n\n"):
            key = self._key(paragraph)
            if key is not None:
                if key in self._seen:
                    dropped += 1
                    continue
                self._seen.add(key)
            kept.append(paragraph)
        return "\n\n".join(kept), dropped

    def _key(self, paragraph: str) -> bytes | None:
        if len(paragraph) < self.shortest:
            return None
        return hashlib.blake2b(" ".join(_words(paragraph)).encode(), digest_size=12).digest()


class KeptOut:
    """Decontamination: removes paragraphs of evaluation texts, by n-gram overlap.

    A paragraph of at least `shortest` characters is removed if the evaluation texts contain more
    than SHARE of its n-grams of RUN words. Case and punctuation are ignored. So is <unk>, which
    replaces rare words in WikiText: with 10 % of words unknown, 60 % of the n-grams still match.
    Unrelated texts share a few percent.
    """

    def __init__(self, texts: Iterable[str], shortest: int) -> None:
        self._shortest = shortest
        self._runs = {run for text in texts for run in _runs(text)}

    def without(self, text: str) -> tuple[str, int]:
        """`text` without paragraphs of these texts, and the number removed."""
        paragraphs = text.split("\n\n")
        kept = [paragraph for paragraph in paragraphs if not self._holds(paragraph)]
        return "\n\n".join(kept), len(paragraphs) - len(kept)

    def _holds(self, paragraph: str) -> bool:
        if not self._runs or len(paragraph) < self._shortest:
            return False
        runs = _runs(paragraph)
        return sum(run in self._runs for run in runs) > SHARE * len(runs)


def _words(text: str) -> list[str]:
    """The words of `text`, without case and punctuation."""
    return re.sub(r"[\W_]+", " ", text.casefold()).split()


def _runs(text: str) -> list[int]:
    """Hashes of all n-grams of RUN words."""
    words = [word for word in _words(text) if word != "unk"]
    return [hash(tuple(words[at : at + RUN])) for at in range(len(words) - RUN + 1)]
