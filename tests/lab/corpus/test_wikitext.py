"""WikiText's spelling: words apart, rare ones unknown, lines and headings."""

import pytest
from lowlat_lab.corpus.document import Document
from lowlat_lab.corpus.wikitext import RARE, spell_as_wikitext


def document(text: str) -> Document:
    return Document(title="Lobster", text=text, path="dump/Lobster")


def spelled(text: str) -> str:
    """One paragraph, of which every word occurs often enough."""
    article = document(f"Lobster\n\n{text}")
    (one, *_), _ = spell_as_wikitext([article] * RARE, [])
    assert one.text.startswith(" \n = Lobster = \n \n ") and one.text.endswith(" \n \n")
    return one.text.removeprefix(" \n = Lobster = \n \n ").removesuffix(" \n \n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Up to 1,024.5 km (24 in).", "Up to 1 @,@ 024 @.@ 5 km ( 24 in ) ."),
        ("red-tipped, 5–8 or a/b; so: 5%.", "red @-@ tipped , 5 – 8 or a / b ; so : 5 % ."),  # noqa: RUF001
        ('She said "no!" [sic]...', 'She said " no ! " [ sic ] ...'),
        ("A crew's boat, the crews' boats.", "A crew 's boat , the crews ' boats ."),
        ("They don't, we'll.", "They don 't , we 'll ."),
        ("the 'anti' concept.", "the ' anti ' concept ."),
        ("In the U.S. of Dr. H. Smith, i.e. his.", "In the U.S. of Dr. H. Smith , i.e. his ."),
    ],
)
def test_words_stand_apart(text: str, expected: str) -> None:
    assert spelled(text) == expected


def test_headings_paragraphs_and_lists() -> None:
    article = document(
        "Lobster\n\nIt is blue.\n\nIt is large.\n\nLife\n\nIt is old.\n- so so\n\n- so"
    )
    (one, *_), _ = spell_as_wikitext([article] * RARE, [])
    assert one.text == (
        " \n = Lobster = \n \n It is blue . \n It is large . \n \n = = Life = = \n \n"
        " It is old . \n so so \n so \n \n"
    )


def test_words_are_rare_in_the_documents_that_are_trained_on() -> None:
    train = [document("One\n\nThe claw of one one, the claw.\n\nThe the of of of , , ...")]
    held_out = [document("One\n\nThe claw of one.")]
    (one,), (other,) = spell_as_wikitext(train, held_out)
    assert one.text == (
        " \n = <unk> = \n \n <unk> <unk> of <unk> <unk> , <unk> <unk> <unk> \n"
        " <unk> <unk> of of of , , <unk> \n \n"
    )
    assert other.text == " \n = <unk> = \n \n <unk> <unk> of <unk> <unk> \n \n"
