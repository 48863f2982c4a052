"""A whole corpus out of tiny packages."""

import json
from pathlib import Path

import pytest
import typer
from lowlat_lab.cli.collect import collect as collect_verb
from lowlat_lab.corpus.collect import collect_corpus
from lowlat_lab.corpus.output import CorpusSummary
from lowlat_lab.corpus.recipe import CorpusRecipe, Source
from typer.testing import CliRunner

from lowlat.utils.errors import UserError

from .builders import make_source, make_tgz
from .test_mediawiki import export, page

LONG = "A paragraph that is long enough to be taken only once, wherever it may stand in the corpus."
HELD = "Words of a speech that no training may see, however often they are quoted elsewhere here."
SEEN = "Words of a text used for evaluation, which a package may quote at length without saying so."


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def two_sources(shelf: Path, **fields: object) -> list[Source]:
    """Speeches with one held out, and notes that quote them."""
    speeches = {
        "p/1900.txt": f"Old\u2019s.\n\n{LONG}".encode(),
        "p/2020.txt": HELD.encode(),
        "p/LICENCE": b"free",
    }
    notes = {"p/notes.txt": f"Note.\n\n{LONG}\n\n{HELD}\n\n{SEEN}\n\nEnd.".encode()}
    licence = {"name": "public domain", "says": "LICENCE", "files": ["p/LICENCE"]}
    return [
        make_source(
            make_tgz(shelf / "a-b-1.0.tgz", speeches),
            "npm:@a/b==1.0",
            name="speeches",
            held_out=["p/2020.txt"],
            licence=licence,
        ),
        make_source(make_tgz(shelf / "c-1.0.tgz", notes), "npm:c==1.0", name="notes", **fields),
    ]


def articles_of(shelf: Path, dump: str, **options: object) -> Source:
    """The export `dump` of a wiki in an archive on the shelf."""
    archive = make_tgz(shelf / "c-1.0.tgz", {"p/dump.xml": dump})
    fields = {"name": "x", "members": ["*.xml"], "format": "mediawiki", **options}
    return make_source(archive, "npm:c==1.0", **fields)


def collect(sources: list[Source], folder: Path, **options: object) -> CorpusSummary:
    return collect_corpus(CorpusRecipe(name="t", source=tuple(sources)), folder, **options)


def test_a_corpus_and_what_is_written_down(shelf: Path, tmp_path: Path) -> None:
    keep_out = tmp_path / "evaluation.txt"
    keep_out.write_text(f" = Title = \n{SEEN}\n")
    out = tmp_path / "out"
    summary = collect(two_sources(shelf), out, keep_out=[keep_out])
    assert records(out / "train" / "speeches.jsonl") == [
        {"text": f"Old's.\n\n{LONG}", "source": "speeches", "title": "1900"}
    ]
    assert [record["text"] for record in records(out / "held_out" / "speeches.jsonl")] == [HELD]
    (notes,) = records(out / "train" / "notes.jsonl")
    assert notes["text"] == "Note.\n\nEnd."
    assert (out / "licences" / "speeches" / "p_LICENCE").read_bytes() == b"free"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sources"][1]["dropped"] == {
        "paragraphs that repeat": 2,
        "paragraphs of texts to keep out": 1,
    }
    assert manifest["train_bytes"] == summary.train_bytes == len(f"Old's.\n\n{LONG}Note.\n\nEnd.")
    licences = (out / "LICENCES.md").read_text()
    assert "2 paragraphs that repeat" in licences
    assert "## speeches" in licences and "npm:@a/b==1.0" in licences and "LICENCE" in licences
    assert not list(tmp_path.glob(".out*"))


def test_the_same_recipe_gives_the_same_bytes(shelf: Path, tmp_path: Path) -> None:
    def written(name: str) -> dict[str, bytes]:
        folder = tmp_path / name
        collect(two_sources(shelf), folder)
        files = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    assert written("one") == written("two")


def test_sources_can_be_left_out_by_name(shelf: Path, tmp_path: Path) -> None:
    sources = two_sources(shelf)
    summary = collect(sources, tmp_path / "out", without=["speeches"])
    assert [source.name for source in summary.sources] == ["notes"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["left_out_sources"] == ["speeches"]
    with pytest.raises(UserError, match="--without poems: the recipe has no source of this name"):
        collect(sources, tmp_path / "other", without=["poems"])


def test_articles_are_spelled_after_what_repeats_is_left_out(shelf: Path, tmp_path: Path) -> None:
    articles = {"Claws": "One, one, one.", "Tail": f"{SEEN}\n\nOne, one.\n\nNo, one."}
    dump = export(*(page(title, text) for title, text in articles.items()))
    keep_out = tmp_path / "evaluation.txt"
    keep_out.write_text(SEEN)
    source = articles_of(shelf, dump, wikitext=True)
    collect([source], tmp_path / "out", keep_out=[keep_out])
    claws, tail = (one["text"] for one in records(tmp_path / "out" / "train" / "x.jsonl"))
    assert claws == " \n = <unk> = \n \n <unk> , one , one . \n \n"
    assert tail == " \n = <unk> = \n \n <unk> , one . \n <unk> , one . \n \n"


def test_texts_to_keep_out_are_known_in_another_spelling(shelf: Path, tmp_path: Path) -> None:
    """As WikiText has them, a word in ten unknown. Regression: evaluation text in a corpus."""
    theirs = (
        "The European lobster's claws are unequal: one is for crushing, the other, of 2,500 small "
        "teeth, for cutting; it may well-nigh double its weight in a year or so."
    )
    spelled = (
        " The European <unk> 's claws are unequal : one is for crushing , the other , of 2 @,@ 500 "
        "small teeth , for <unk> ; it may well @-@ nigh double its weight in a year or so . "
    )
    own = "Lobsters of a year, or of two, are for the most part caught in pots, and are of no use."
    dump = export(page("Claws", f"{theirs}\n\n{own}"))
    keep_out = tmp_path / "evaluation.txt"
    keep_out.write_text(f" \n = Claws = \n \n{spelled}\n")
    source = articles_of(shelf, dump)
    collect([source], tmp_path / "out", keep_out=[keep_out])
    (record,) = records(tmp_path / "out" / "train" / "x.jsonl")
    assert own in record["text"] and "unequal" not in record["text"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"][0]["dropped"] == {"paragraphs of texts to keep out": 1}


def test_texts_to_keep_out_without_blanks_between_words(shelf: Path, tmp_path: Path) -> None:
    theirs = "海龙虾的两只螯大小不同一只用来压碎另一只有许多小齿用来切割" * 4
    own = "这一段文字与评测无关因此应当留在语料之中不应被去除" * 4
    dump = export(page("螯", f"{theirs}。\n\n{own}。"))
    keep_out = tmp_path / "evaluation.txt"
    keep_out.write_text(theirs)
    source = articles_of(shelf, dump)
    collect([source], tmp_path / "out", keep_out=[keep_out])
    (record,) = records(tmp_path / "out" / "train" / "x.jsonl")
    assert own in record["text"] and theirs not in record["text"]


def test_an_existing_folder_is_never_touched(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        collect(two_sources(shelf), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_missing_archive_is_said_before_anything_is_written(shelf: Path, tmp_path: Path) -> None:
    sources = two_sources(shelf)
    (shelf / "c-1.0.tgz").unlink()
    with pytest.raises(UserError, match=r"cannot fetch npm:c==1\.0"):
        collect(sources, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_text_to_keep_out_that_is_missing_is_said_first(shelf: Path, tmp_path: Path) -> None:
    sources = two_sources(shelf)
    (shelf / "c-1.0.tgz").unlink()
    with pytest.raises(UserError, match=r"--keep-out .*/evaluation\.txt: cannot be read"):
        collect(sources, tmp_path / "out", keep_out=[tmp_path / "evaluation.txt"])
    assert not list(tmp_path.glob("*out*"))


def test_a_destination_that_cannot_be_written(shelf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/out cannot be written \(Not a directory\)"):
        collect(two_sources(shelf), tmp_path / "file" / "out")


def test_size_limits_choose_by_content_and_keep_the_order(shelf: Path, tmp_path: Path) -> None:
    texts = {f"p/{i:02}.txt": f"{i} ".encode() + b"x" * 997 for i in range(31)}
    source = make_source(
        make_tgz(shelf / "c-1.0.tgz", texts), "npm:c==1.0", max_megabytes=0.011, name="x"
    )
    collect([source], tmp_path / "out")
    titles = [record["title"] for record in records(tmp_path / "out" / "train" / "x.jsonl")]
    assert len(titles) == 11 and titles == sorted(titles) and titles[-1] > "11"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"][0]["dropped"] == {"documents over max_megabytes": 20}


def test_text_is_shaped_as_the_source_says(shelf: Path, tmp_path: Path) -> None:
    text = (
        "Header\n\nSTART\n\nChapter 1\n\n_One_ word.\n\nNotes 7\n\nChapter 2\n\nTwo.\n\nEND\n\nTail"
    )
    source = make_source(
        make_tgz(shelf / "c-1.0.tgz", {"p/book.txt": text.encode()}),
        "npm:c==1.0",
        start="^START$",
        stop="^END$",
        replace=[["_", ""], ["^START$", ""]],
        drop=["^Notes"],
        split="^Chapter",
    )
    collect([source], tmp_path / "out")
    found = records(tmp_path / "out" / "train" / "tiny.jsonl")
    assert [(record["title"], record["text"]) for record in found] == [
        ("book: Chapter 1", "Chapter 1\n\nOne word."),
        ("book: Chapter 2", "Chapter 2\n\nTwo."),
    ]


def test_bytes_that_are_no_text_are_an_error(shelf: Path, tmp_path: Path) -> None:
    archive = make_tgz(shelf / "c-1.0.tgz", {"p/a.txt": b"caf\xe9"})
    source = make_source(archive, "npm:c==1.0")
    with pytest.raises(UserError, match=r"source tiny: p/a\.txt is not utf-8 \(byte 3\)"):
        collect([source], tmp_path / "out")
    latin = make_source(archive, "npm:c==1.0", encoding="latin-1")
    collect([latin], tmp_path / "out")
    assert records(tmp_path / "out" / "train" / "tiny.jsonl")[0]["text"] == "caf\u00e9"


def test_a_held_out_glob_that_matches_nothing_is_an_error(shelf: Path, tmp_path: Path) -> None:
    """Regression: a renamed file quietly moves from evaluation into training."""
    archive = make_tgz(shelf / "c-1.0.tgz", {"p/a.txt": b"text"})
    source = make_source(archive, "npm:c==1.0", held_out=["p/2020.txt"])
    with pytest.raises(UserError, match=r"held_out matches no document: p/2020\.txt"):
        collect([source], tmp_path / "out")


def test_the_verb_collects_and_sums_up(shelf: Path, tmp_path: Path) -> None:
    (source,) = two_sources(shelf)[1:]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""name = "t"
[[source]]
name = "notes"
about = "Notes."
package = "{source.package}"
sha256 = "{source.sha256}"
bytes = {source.bytes}
members = ["*.txt"]
[source.licence]
name = "MIT"
says = "LICENCE"
"""
    )
    app = typer.Typer()
    app.command()(collect_verb)
    result = CliRunner().invoke(app, [str(recipe), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "1 documents  notes (MIT)" in result.stdout
    assert result.stdout.rstrip().endswith(f"in {tmp_path / 'out'}")
    assert records(tmp_path / "out" / "train" / "notes.jsonl")[0]["text"].startswith("Note.")
