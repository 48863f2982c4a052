"""Articles out of MediaWiki XML exports."""

import bz2
import sys
from xml.sax.saxutils import escape

import pytest
from lowlat_lab.corpus import mediawiki
from lowlat_lab.corpus.document import Member
from lowlat_lab.corpus.mediawiki import mediawiki_documents

from lowlat.utils.errors import UserError

NAMESPACE = "http://www.mediawiki.org/xml/export-0.10/"


def page(title: str, text: str, *, ns: int = 0, redirect: str = "") -> str:
    to = f'<redirect title="{redirect}" />' if redirect else ""
    return (
        f"<page><title>{title}</title><ns>{ns}</ns>{to}"
        f"<revision><text>{escape(text)}</text></revision></page>"
    )


def export(*pages: str) -> bytes:
    return f'<mediawiki xmlns="{NAMESPACE}">{"".join(pages)}</mediawiki>'.encode()


def article(markup: str) -> str:
    """What becomes of one article, without its title."""
    member = Member(path="w.xml", data=export(page("T", markup)))
    (document,) = mediawiki_documents(member)
    title, _, text = document.text.partition("\n\n")
    assert title == document.title == "T"
    return text


def test_articles_are_documents_and_nothing_else_is() -> None:
    data = export(
        page("Alpha", "The [[letter]]."),
        page("ALPHA", "#REDIRECT [[Alpha]]", redirect="Alpha"),
        page("Talk:Alpha", "I disagree.", ns=1),
        page("Beta", "Another."),
    )
    for member in (
        Member(path="w/dump.xml", data=data),
        Member(path="w/dump.xml", data=b'<?xml version="1.0"?>' + data),
        Member(path="w/dump.xml.bz2", data=bz2.compress(data)),
        Member(path="w/dump.xml.bz2", data=bz2.compress(data[:300]) + bz2.compress(data[300:])),
        Member(path="w/dump.xml", data=data.replace(b"<ns>0</ns>", b"")),
    ):
        found = list(mediawiki_documents(member))
        assert [document.title for document in found] == ["Alpha", "Beta"]
        assert [document.text for document in found] == [
            "Alpha\n\nThe letter.",
            "Beta\n\nAnother.",
        ]
        assert found[0].path == f"{member.path}/Alpha"


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("'''Bold''' and ''italic''", "Bold and italic"),
        ("a [[town hall|hall]], a [[:Category:Halls|list]]", "a hall, a list"),
        ("[[File:a.jpg|thumb|A [[dog]] barks]]A dog.[[Category:Dogs]]", "A dog."),
        ("[[fr:Chien]]A dog.", "A dog."),
        ("[[CSI: Miami|the show]] and [[MI: 5]]", "the show and MI: 5"),
        ("in [[File:a.jpg]] .NET, at 3 : 2 or 9", "in .NET, at 3: 2 or 9"),
        ("see [http://a.org the page] and [http://b.org]", "see the page and"),
        ("true.<ref name=a>A book, p. 3</ref> And<ref name=a/> so.", "true. And so."),
        ("five<!-- six --> &eacute; seven&nbsp;km", "five é seven km"),
        ("A {{convert|10|km|mi}} road {{citation needed}} ends", "A 10 km road ends"),
        ("{{convert|60|to|70|km}}, {{As of|2009|6}}", "60 to 70 km, As of 2009"),
        ("a&#xD800;b", "a?b"),
        ("Are:\n* a\n** b\n** {{c}}\n* d<pre>x  y</pre>", "Are:\n- a\n- b\n- d"),
        ("a Greek ({{lang|el|λόγος}}; {{IPA|x}}) word", "a Greek (λόγος;) word"),
        ("a man ({{IPA|x}}; born 1870) of ({{audio|y}}) note", "a man (born 1870) of note"),
        ("x<math>y^2</math>,\n{| class=w\n| cell\n|}\nafter", "x,\n\nafter"),
        ("one\n\n\n\n  two   three", "one\n\ntwo three"),
        ("Are:\n* first [[thing]]\n* {{template}}\n* second", "Are:\n- first thing\n- second"),
        ("Rows\n{| never closed\n|-\n! head\n| cell", "Rows"),
    ],
)
def test_markup_becomes_what_a_reader_sees(markup: str, text: str) -> None:
    assert article(markup) == text


def test_sections_that_list_other_texts_are_left_out() -> None:
    markup = (
        "Intro\n\n== Life ==\nLong.\n\n=== Notes ===\n* a book\n\n=== Youth ===\nShort.\n\n"
        "== References ==\n{{reflist}}\n=== Web ===\n* a page\n\n== Death ==\nIt ended."
    )
    assert article(markup) == "Intro\n\nLife\n\nLong.\n\nYouth\n\nShort.\n\nDeath\n\nIt ended."


NO_EXPORTS = [
    b"no XML",
    export(page("T", "x"))[:-20],
    b"",
    b"<html></html>",
    b'<?xml version="1.0" encoding="klingon"?><a/>',
    b'<?xml version="1.0" encoding="gb18030"?><a/>',
]


@pytest.mark.parametrize("data", NO_EXPORTS)
def test_what_is_no_export_is_an_error(data: bytes) -> None:
    with pytest.raises(UserError, match=r"w\.xml is not a MediaWiki XML export"):
        list(mediawiki_documents(Member(path="w.xml", data=data)))


def test_damaged_bzip2_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bz2.compress(export(page("T", "x" * 1000)))
    for data, message in [(whole[:-5], "cut short"), (b"x" + whole, "not complete bzip2")]:
        with pytest.raises(UserError, match=message):
            list(mediawiki_documents(Member(path="w.xml.bz2", data=data)))
    monkeypatch.setattr(mediawiki, "MAX_MEMBER", 101)
    with pytest.raises(UserError, match="over 101 bytes"):
        list(mediawiki_documents(Member(path="w.xml.bz2", data=whole)))


def test_a_missing_parser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(UserError, match=r"pip install mwparserfromhell$"):
        list(mediawiki_documents(Member(path="w.xml", data=export(page("T", "x")))))
