"""Corpus recipes: what they may say, and what their errors name."""

from pathlib import Path

import pytest
from lowlat_lab.corpus.recipe import read_corpus_recipe, split_package

from lowlat.train.recipe.schema import read_recipe
from lowlat.utils.errors import UserError

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "lab" / "recipes"
SHIPPED = RECIPES / "corpus.toml"
SOURCES = ROOT / "lowlat" / "models" / "minnow" / "SOURCES.md"
SOURCE = """
name = "tiny"
[[source]]
name = "a"
about = "x"
package = "npm:@a/b==1.0"
sha256 = "%s"
bytes = 7
members = ["*.txt"]
[source.licence]
name = "public domain"
says = "README"
""" % ("0" * 64)


def test_the_shipped_recipe_is_valid_and_every_source_names_its_licence() -> None:
    recipe = read_corpus_recipe(SHIPPED)
    free = {"public domain", "MIT", "BSD-3-Clause", "Apache-2.0", "MIT OR Apache-2.0", "PSF-2.0"}
    free |= {"PostgreSQL", "WordNet-3.0", "CC-BY-3.0"}
    assert {source.licence.name for source in recipe.source} <= free
    for source in recipe.source:
        assert source.licence.files, source.name
        assert source.licence.holder or source.licence.name == "public domain", source.name
    assert [source.name for source in recipe.source if source.held_out] == ["austen", "sotu"]


def test_the_healing_corpus_is_of_the_same_sources_and_wikipedia() -> None:
    recipe = read_corpus_recipe(RECIPES / "recovery-corpus.toml")
    wikipedia, *others = recipe.source
    assert wikipedia.licence.name == "CC-BY-SA-3.0" and wikipedia.licence.holder
    known = {source.name: source for source in read_corpus_recipe(SHIPPED).source}
    for source in others:
        assert source.max_megabytes is not None and source.max_megabytes < 0.5, source.name
        cap = known[source.name].max_megabytes
        assert source.model_copy(update={"max_megabytes": cap}) == known[source.name]


def test_the_other_spelling_is_of_the_same_articles() -> None:
    (plain, *_), (spelled,) = (
        read_corpus_recipe(RECIPES / f"{name}.toml").source
        for name in ("recovery-corpus", "recovery-wikitext")
    )
    assert spelled.wikitext
    assert spelled.about.startswith(plain.about.removesuffix("."))
    own = {"name": plain.name, "about": plain.about, "wikitext": False}
    assert spelled.model_copy(update=own) == plain


def test_packages_are_taken_apart() -> None:
    assert split_package("npm:@a/b==1.0") == ("npm", "@a/b", "1.0")
    assert split_package("debian:x==1:2~3") == ("debian", "x", "1:2~3")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('members = ["*.txt"]', 'member = ["*.txt"]', r"source a: members: is missing"),
        ("bytes = 7", "bytes = 7\nbites = 7", r"source a: bites: is not a key of corpus recipes"),
        ("npm:@a/b==1.0", "npm:@a/b", "source a: package 'npm:@a/b' does not end in an exact"),
        ("npm:@a/b==1.0", "npm:../b==1.0", r"is not pypi\|npm\|debian:NAME==VERSION"),
        ("npm:@a/b==1.0", "pypi:-e==1.0", r"is not pypi\|npm\|debian:NAME==VERSION"),
        ("npm:@a/b==1.0", "deb:b==1.0", r"is not pypi\|npm\|debian:NAME==VERSION"),
        ("bytes = 7", "bytes = 7\nsdist = true", "sdist is for pypi packages only"),
        ("bytes = 7", 'bytes = 7\nroot = ["main"]', "root and skip are for format 'html' only"),
        ("bytes = 7", "bytes = 7\nwikitext = true", "wikitext is for format 'mediawiki' only"),
        ("bytes = 7", 'bytes = 7\nformat = "html"\nskip = ["a > b"]', r"skip\.0: 'a > b' is not"),
        ("bytes = 7", 'bytes = 7\ndrop = ["("]', r"drop\.0: '\(' is not a regular expression"),
        ("0" * 64, "0" * 63, "source a: sha256"),
        ('name = "a"', 'name = "../a"', "source ../a: name"),
        ("bytes = 7", "bytes = 0", "source a: bytes"),
        ("bytes = 7", 'bytes = "7"', "source a: bytes: Input should be a valid integer"),
        ('says = "README"', "", "source a: licence.says: is missing"),
        ("name = ", "name == ", "is not TOML"),
    ],
)
def test_faults_name_source_and_field(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(SOURCE.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_corpus_recipe(path)


def test_a_source_that_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\nsource = ["y"]\n')
    with pytest.raises(UserError, match="source 0: Input should be an object"):
        read_corpus_recipe(path)


def test_two_sources_of_one_name_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(SOURCE + SOURCE.split("\n", 2)[2])
    with pytest.raises(UserError, match="two sources have the same name"):
        read_corpus_recipe(path)


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_corpus_recipe(tmp_path / "none.toml")


def test_minnow_names_what_it_was_trained_on() -> None:
    """Licences ask for it wherever the weights go."""
    rows = [line for line in SOURCES.read_text().splitlines() if line.startswith("| ")][1:]
    sources = read_corpus_recipe(SHIPPED).source
    assert len(rows) == len(sources)
    for row, source in zip(rows, sources, strict=True):
        licence = source.licence
        assert {source.package, licence.name} <= {cell.strip(" `") for cell in row.split("|")}
        assert licence.holder in row


def test_the_two_kinds_of_recipes_are_distinguished() -> None:
    """Each says which command the other is for."""
    with pytest.raises(UserError, match=r"corpus.toml: is a recipe for text.*; lowlat-lab coll"):
        read_recipe(SHIPPED)
    with pytest.raises(UserError, match=r"tiny.toml: is a training recipe.*; lowlat train"):
        read_corpus_recipe(ROOT / "recipes" / "tiny.toml")
