"""Articles in WikiText's spelling: tokenised punctuation, @-@ hyphens, <unk>.

Owns that spelling (Merity et al., "Pointer Sentinel Mixture Models", section 4.3): punctuation
stands alone, @-@ @,@ @.@ are signs that joined what is on either side, a rare word is <unk>, a
paragraph is one line with a blank at either end, and = signs = stand around headings.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from lowlat_lab.corpus.document import Document

RARE = 3
"""Words that a corpus holds less often than this are unknown, as in the paper."""
UNKNOWN = "<unk>"
HEADING = re.compile(r"(?!- ).{1,60}(?<![.:;,!?])")
"""Paragraphs that are headings: one short line that no punctuation ends, no item of a list."""
JOINED = re.compile(r"(?<=\w)-(?=\w)|(?<=\d)[,.](?=\d)")
SIGNS = re.compile(r'(?<!@)[,;:](?!@)|[!?()\[\]"%$£&/–—°+*~]|\.{3,}')  # noqa: RUF001
INNER_APOSTROPHE = re.compile(r"(?<=\w)'(?=\w)")  # the rest of the word stays with it: 's, 't, 're
OUTER_APOSTROPHE = re.compile(r"(?<=\S)'(?=\s|$)|(?<!\S)'(?=\w)")
STOP = re.compile(
    r"\b(?:[A-Z]|Mrs?|Ms|Drs?|St|Jr|Sr|Co|Lt|Col|Gen|Sgt|Nos?|Inc|Ltd|Bros|vs|pp)\.|\.\w\.|"
    r"(?<!\.)(?P<alone>\.)(?=\s|$)"
)
"""Full stops of abbreviations, which stay with their word, and those that end a sentence."""


def spell_as_wikitext(
    train: Sequence[Document], held_out: Sequence[Document]
) -> tuple[list[Document], list[Document]]:
    """Both with their texts spelled so; a word is rare if it is in `train`, all its documents."""
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
    """The lines of an article, words apart: its title, headings and paragraphs."""
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
    """`text` with a blank between all that WikiText holds apart."""
    text = JOINED.sub(lambda match: f" @{match[0]}@ ", text)
    text = SIGNS.sub(r" \g<0> ", text)
    text = INNER_APOSTROPHE.sub(" '", OUTER_APOSTROPHE.sub(" ' ", text))
    return STOP.sub(lambda match: " ." if match["alone"] else match[0], text)
