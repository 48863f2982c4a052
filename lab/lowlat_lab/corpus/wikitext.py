"""WikiText format of articles: tokenised punctuation, @-@ hyphens, <unk>, = headings =.

The format is that of Merity et al., "Pointer Sentinel Mixture Models", section 4.3. Punctuation is
separated by spaces; @-@, @,@ and @.@ are signs inside words and numbers; rare words are <unk>; a
paragraph is one line with a space at both ends.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lowlat_lab.corpus.document import Document

RARE = 3
"""Words with fewer occurrences in the corpus become <unk>, as in the paper."""
UNKNOWN = "<unk>"
HEADING = re.compile(r"(?!- ).{1,60}(?<![.:;,!?])")
"""Headings: one short line without punctuation at its end, not a list item."""
JOINED = re.compile(r"(?<=\w)-(?=\w)|(?<=\d)[,.](?=\d)")
SIGNS = re.compile(r'(?<!@)[,;:](?!@)|[!?()\[\]"%$£&/–—°+*~]|\.{3,}')  # noqa: RUF001
INNER_APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")  # starts a token: 's, 't, 're
OUTER_APOSTROPHE = re.compile(r"(?<=\S)'(?=\s|$)|(?<!\S)'(?=\w)")
STOP = re.compile(
    r"\b(?:[A-Z]|Mrs?|Ms|Drs?|St|Jr|Sr|Co|Lt|Col|Gen|Sgt|Nos?|Inc|Ltd|Bros|vs|pp)\.|\.\w\.|"
    r"(?<!\.)(?P<alone>\.)(?=\s|$)"
)
"""Full stops: those of abbreviations, which stay in the word, and those that end a sentence."""


def spell_as_wikitext(
    train: Sequence[Document], held_out: Sequence[Document]
) -> tuple[list[Document], list[Document]]:
    """Both splits in WikiText's format. Words are counted over all documents of `train`."""
    count = Counter(
        word for document in train for line in _lines(document.text) for word in line.split()
    )
    known = {"="} | {word for word, times in count.items() if times >= RARE}

    def spelled(document: Document) -> Document:
        lines = [
            " ".join(["", *(word if word in known else UNKNOWN for word in line.split()), ""])
            for line in _lines(document.text)
        ]
        return replace(document, text="\n".join(line or " " for line in lines) + "\n")

    return [spelled(one) for one in train], [spelled(one) for one in held_out]


def _lines(text: str) -> list[str]:
    """Tokenised lines of an article: its title, headings and paragraphs."""
    lines: list[str] = [""]
    for number, paragraph in enumerate(text.split("\n\n")):
        marks = "=" if number == 0 else "= =" if HEADING.fullmatch(paragraph) else ""
        if marks and lines[-1]:
            lines.append("")
        for line in paragraph.split("\n"):
            lines.append(f"{marks} {_words(line.removeprefix('- '))} {marks}")
        if marks:
            lines.append("")
    return [*lines, ""]


def _words(text: str) -> str:
    """`text` with spaces between WikiText's tokens."""
    text = JOINED.sub(lambda match: f" @{match[0]}@ ", text)
    text = SIGNS.sub(r" \g<0> ", text)
    text = INNER_APOSTROPHE.sub(" '", OUTER_APOSTROPHE.sub(" ' ", text))
    return STOP.sub(lambda match: " ." if match["alone"] else match[0], text)
