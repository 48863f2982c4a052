"""lowlat-lab is a distribution of its own: lowlat never imports it, and it has its own commands."""

import ast
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from lowlat_lab.corpus.recipe import read_corpus_recipe
from typer.testing import Result

from lowlat.train.recipe.schema import read_recipe
from lowlat.utils.errors import UserError

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "lab" / "recipes").glob("*.toml"))


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_the_product_never_imports_the_lab() -> None:
    files = [*(ROOT / "lowlat").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    assert len(files) > 300
    assert [path for path in files if "lowlat_lab" in imported(path)] == []


def test_what_only_the_lab_needs_is_no_dependency_of_the_product() -> None:
    product = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lab = tomllib.loads((ROOT / "lab" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "mwparserfromhell" not in product
    assert lab["name"] == "lowlat-lab"
    assert lab["scripts"] == {"lowlat-lab": "lowlat_lab.cli.main:run"}
    assert any(each.startswith("mwparserfromhell") for each in lab["dependencies"])


def test_commands(lowlat_lab: Callable[..., Result]) -> None:
    for arguments, names in (
        (["--help"], ["study", "collect", "page"]),
        (["study", "--help"], ["attention", "balance", "mtp", "precision"]),
        (["page", "--help"], ["study", "conversion"]),
    ):
        result = lowlat_lab(*arguments)
        assert result.exit_code == 0
        assert all(name in result.output for name in names)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_corpus_recipes_are_read(path: Path) -> None:
    assert read_corpus_recipe(path).source
    with pytest.raises(UserError, match="lowlat-lab collect"):
        read_recipe(path)
