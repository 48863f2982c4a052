"""Even text, whole paragraphs, nothing twice."""

import re

from lowlat_lab.corpus.clean import Paragraphs, even_text, unwrapped, without_dropped


def test_text_is_even() -> None:
    odd = "\ufeffe\u0301\u00a0a\u00ad\u200bb\x07\x00\r\nc  \r\n\n\n\n d\te\x1b[0m\n"
    assert even_text(odd, plain_quotes=False) == "\u00e9 ab\nc\n\n d  e[0m"


def test_quotes_become_plain_only_when_asked() -> None:
    quoted = "\u201cIt\u2019s\u2026\u201d\u2014he"
    assert even_text(quoted, plain_quotes=True) == '"It\'s..."\u2014he'
    assert even_text(quoted, plain_quotes=False) == quoted


def test_wrapped_prose_is_joined_and_verse_is_not() -> None:
    prose = (
        "It is a truth universally acknowledged, that a single man in possession\n"
        "of a good fortune, must be in want of a wife."
    )
    verse = "Of man's first disobedience,\nand the fruit\nOf that forbidden tree,\nwhose taste"
    code = "A loop:\n    for x in y:\n        pass"
    assert unwrapped("\n\n".join([prose, verse, code])).split("\n\n") == [
        prose.replace("\n", " "),
        verse,
        code,
    ]


def test_paragraphs_with_a_pattern_go() -> None:
    text, dropped = without_dropped("Chapter 1\n\nNotes\n\nText", [re.compile("^Notes$")])
    assert (text, dropped) == ("Chapter 1\n\nText", 1)


def test_long_paragraphs_are_kept_once_and_short_ones_always() -> None:
    seen = Paragraphs(shortest=11)
    first = "A long paragraph, quoted.\n\nShort.\n\nShort."
    assert seen.without_seen(first) == (first, 0)
    again = "a long PARAGRAPH quoted\n\nShort.\n\nSomething new here"
    assert seen.without_seen(again) == ("Short.\n\nSomething new here", 1)
