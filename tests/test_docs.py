"""Documents that quote code or link to files stay true."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROW = re.compile(r"^\|.*\| `(?P<code>.+?)` \| (?P<file>lowlat/\S+\.py) \|$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?://|#)(?P<target>[^)#]+)")
ANCHOR = re.compile(r"\]\((?P<page>[^):#]*\.md)?#(?P<anchor>[^)]+)\)")
HEADING = re.compile(r"^#+ (?P<text>.+)$", re.MULTILINE)
REPOSITORY_PATH = re.compile(
    r"(?<![\w/.~-])(?:benchmarks|cmake|csrc|deploy|docs|examples|lab|lowlat|recipes|tests)/[\w./*-]*[\w*/]"
)
WRITTEN = re.compile(r"recipes/.*-tokens|recipes/small|benchmarks/results/NAME")
"""Folders that commands of the pages write, and placeholders."""
PAGES = sorted(
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
)


def quotes() -> list[tuple[str, str]]:
    pages = [
        (ROOT / page).read_text() for page in ("docs/mla.md", "docs/attention.md", "docs/sparse.md")
    ]
    return [(match["code"], match["file"]) for text in pages for match in ROW.finditer(text)]


def flat(text: str) -> str:
    """Code without the white space that formatting may move."""
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize(
    ("generator", "page"),
    [("list_commands", "commands.md"), ("list_recipe_keys", "recipe-reference.md")],
)
def test_generated_pages_are_current(generator: str, page: str) -> None:
    spec = importlib.util.spec_from_file_location(generator, ROOT / f"docs/{generator}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.page()
    assert text == (ROOT / "docs" / page).read_text(), (
        f"run: python docs/{generator}.py docs/{page}"
    )
    assert "|  |" not in text, "a recipe key has no docstring"


def test_every_equation_has_its_line() -> None:
    assert len(quotes()) >= 40


@pytest.mark.parametrize(("code", "file"), quotes())
def test_quoted_code_is_in_its_file(code: str, file: str) -> None:
    assert flat(code) in flat((ROOT / file).read_text()), f"{file} no longer contains: {code}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for match in LINK.finditer(path.read_text()):
        assert (path.parent / match["target"]).exists(), (
            f"{page} links to missing {match['target']}"
        )


def anchors(text: str) -> set[str]:
    """The headings of a page as links name them."""
    headings = (match["text"].lower() for match in HEADING.finditer(text))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_name_headings(page: str) -> None:
    path = ROOT / page
    for match in ANCHOR.finditer(path.read_text()):
        target = path if match["page"] is None else path.parent / match["page"]
        assert match["anchor"] in anchors(target.read_text()), f"{page}: no {match[0]}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_named_paths_exist(page: str) -> None:
    """Paths in prose, tables and commands; links have a test of their own."""
    text = LINK.sub("", (ROOT / page).read_text())
    named = [path for path in REPOSITORY_PATH.findall(text) if not WRITTEN.fullmatch(path)]
    missing = [path for path in named if not any(ROOT.glob(path))]
    assert not missing, f"{page} names {missing}"


@pytest.mark.parametrize(("page", "folder"), [("architecture.md", "lowlat"), ("native.md", "csrc")])
def test_paths_below_a_folder_exist(page: str, folder: str) -> None:
    """Paths in backquotes that the page writes without `folder`: `engine/scheduler.py`."""
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`((?:\w+/)+\w*(?:\.py|\.h|\.cpp|(?<=/)))`", text)
    assert len(named) > 10
    missing = [p for p in named if not any((ROOT / top / p).exists() for top in (folder, ""))]
    assert not missing, f"{page} names {missing}"


def test_the_site_has_every_page() -> None:
    """mkdocs.yml names all pages of docs/, and folders whose pages it takes whole."""
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    named = set(re.findall(r"[\w/.-]+\.md", navigation)) - {"source/" + page for page in PAGES}
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}
    folders = set(re.findall(r"(\w+)/$", navigation, re.MULTILINE))
    assert folders == {path.name for path in (ROOT / "docs").iterdir() if any(path.glob("*.md"))}
