"""Novels out of R, Bibles out of SWORD, entries out of reference works."""

import gzip
import json

import pytest
from lowlat_lab.corpus import r_data, sword
from lowlat_lab.corpus.document import Member
from lowlat_lab.corpus.r_data import read_texts
from lowlat_lab.corpus.reference import (
    dictionary_documents,
    factbook_documents,
    wordnet_documents,
)
from lowlat_lab.corpus.sword import osis_to_text, sword_documents

from lowlat.utils.errors import UserError

from .builders import r_database, sword_files


def test_character_vectors_of_r_are_read() -> None:
    texts = {"emma": ["EMMA", "", "é"], "persuasion": ["x"]}
    assert read_texts(*r_database(texts), "Rdata.rdx") == texts


def test_damaged_databases_of_r_are_errors() -> None:
    index, database = r_database({"emma": ["EMMA" * 31]})
    for broken in [(index[:-9], database), (index, database[:-9]), (b"", b""), (index, b"")]:
        with pytest.raises(UserError, match=r"Rdata\.rdx is not a supported R database"):
            read_texts(*broken, "Rdata.rdx")


def test_objects_of_r_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r_data, "MAX_SIZE", 101)
    with pytest.raises(UserError, match="over 101 bytes"):
        read_texts(*r_database({"emma": ["EMMA" * 31]}), "Rdata.rdx")


BOOK = '<milestone n="Preface" type="x-usfm-h"/><milestone n="Ruth" type="x-usfm-h"/>'
CHAPTER = '<chapter n="1" osisID="Ruth.1" sID="Ruth.1"/>'


def module(blocks: list[list[str]], *, wide: bool) -> list[Member]:
    files = sword_files(blocks, wide=wide)
    return [Member(path=f"m/{name}", data=data) for name, data in files.items()]


@pytest.mark.parametrize("wide", [False, True])
def test_books_of_a_module_are_documents(wide: bool) -> None:
    blocks = [
        ["", BOOK, CHAPTER, "In the days of the judges ", "there was a famine."],
        [CHAPTER.replace("Ruth.1", "Esth.3"), "After these things"],
    ]
    found = list(sword_documents(module(blocks, wide=wide)))
    assert [(document.title, document.text) for document in found] == [
        ("Ruth", "Chapter 1\n\nIn the days of the judges there was a famine."),
        ("Esth 3", "Chapter 3\n\nAfter these things"),
    ]


@pytest.mark.parametrize(("wide", "verses"), [(False, 6), (True, 5), (False, 12), (True, 10)])
def test_both_widths_of_an_index_are_distinguished(wide: bool, verses: int) -> None:
    """Regression: an index of 60 bytes read with the wrong size of its records."""
    texts = [f"Verse {i}. " for i in range(verses)]
    files = sword_files([texts], wide=wide)
    assert len(files["ot.bzv"]) % 60 == 0
    (document,) = sword_documents(module([texts], wide=wide))
    assert document.text == "".join(texts).strip()


def test_a_comment_shared_by_verses_comes_once() -> None:
    files = sword_files([["One comment."]])
    files["ot.bzv"] *= 3
    members = [Member(path=name, data=data) for name, data in files.items()]
    assert [document.text for document in sword_documents(members)] == ["One comment."]


def test_osis_becomes_paragraphs_without_notes() -> None:
    markup = (
        '<title type="main">Title</title><div type="x-p" sID="g1"/><w lemma="x">God</w>'
        '<note placement="foot">a note</note><w>made</w> it<note>b</note>, &amp; saw.'
        '<div eID="g1" type="x-p"/><lg><l>one</l><l>two</l></lg>'
    )
    assert osis_to_text(markup) == "Title\n\nGod made it, & saw.\n\none\ntwo"


def test_damaged_modules_are_errors() -> None:
    whole = module([[BOOK, "text" * 31]], wide=False)
    cut = [Member(path=member.path, data=member.data[:-5]) for member in whole]
    for members in (whole[:2], cut, whole[1:]):
        with pytest.raises(UserError, match="SWORD module"):
            list(sword_documents(members))


def test_blocks_of_a_module_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sword, "MAX_BLOCK", 101)
    with pytest.raises(UserError, match="over 101 bytes"):
        list(sword_documents(module([["text" * 31]], wide=False)))


def test_synsets_are_entries() -> None:
    lines = [
        "  1 This licence stands first",
        '00001740 29 v 02 breathe 0 take_a_breath 0 001 * 00005 v 0000 | draw air; "I breathe"  ',
        "00002 00 a 01 galore(ip) 0 000 | existing in abundance",
    ]
    (document,) = wordnet_documents(Member(path="data.verb", data="\n".join(lines).encode()))
    assert document.text == (
        'breathe, take a breath (verb): draw air; "I breathe"\n\n'
        "galore (adjective): existing in abundance"
    )
    assert document.title == "breathe to galore"
    with pytest.raises(UserError, match="is not a synset"):
        list(wordnet_documents(Member(path="data.verb", data=b"what is this")))


def test_a_country_becomes_sentences() -> None:
    profile = {
        "Introduction": {"Background": {"text": "It was free in 1960. ++ Later it was not"}},
        "Government": {
            "Country name": {
                "conventional long form": {"text": "none"},
                "conventional short form": {"text": "Xa (Ya)"},
            },
            "Capital": {"text": "Za", "note": {"text": "moved"}, "time": {"text": "NA"}},
        },
        "Empty": {},
    }
    member = Member(path="p/xa.json", data=json.dumps(profile).encode())
    (document,) = factbook_documents(member)
    assert document.title == "Xa"
    assert document.text.split("\n\n") == [
        "Xa: Introduction",
        "It was free in 1960.",
        "Later it was not.",
        "Xa: Government",
        "Country name: conventional long form: none. conventional short form: Xa (Ya).",
        "Capital: Za. note: moved.",
    ]
    for data in (b"[1]", b"{", b'"text"'):
        with pytest.raises(UserError, match=r"xa\.json"):
            list(factbook_documents(Member(path="p/xa.json", data=data)))


def test_entries_of_dictionaries_are_grouped() -> None:
    text = "".join(f"word{i}\n\n    n. Number {i}.\n\n" for i in range(43))
    member = Member(path="x.dict.dz", data=gzip.compress(text.encode()))
    first, second = dictionary_documents(member)
    assert (first.title, second.title) == ("word0", "word40")
    assert first.text.startswith("word0\n\n    n. Number 0.\n\nword1\n")
    assert second.text.endswith("word42\n\n    n. Number 42.")
