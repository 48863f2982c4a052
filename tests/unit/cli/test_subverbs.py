"""A verb with verbs below it: which of the two a command line means, and what --help shows."""

from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner, Result

from lowlat.cli.subverbs import with_subverbs


def bake(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what.")] = False,
) -> None:
    """Bake what a recipe says."""
    print(f"bake {recipe} {dry_run}")


def taste(cakes: Annotated[list[Path], typer.Argument(metavar="CAKE")]) -> None:
    """Taste what was baked."""
    print(f"taste {[str(cake) for cake in cakes]}")


def run(*arguments: str) -> Result:
    app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})
    verb = with_subverbs(bake, {"taste": taste}, epilog="See also: lowlat bake taste CAKE")
    app.add_typer(verb, name="bake")
    app.command("other")(lambda: None)
    return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        (("bake", "a.toml"), "bake a.toml False\n"),
        (("bake", "a.toml", "--dry-run"), "bake a.toml True\n"),
        (("bake", "--dry-run", "a.toml"), "bake a.toml True\n"),
        (("bake", "./taste"), "bake taste False\n"),
        (("bake", "--", "taste"), "bake taste False\n"),
        (("bake", "taste", "x", "y"), "taste ['x', 'y']\n"),
    ],
)
def test_the_first_word_decides(arguments: tuple[str, ...], printed: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (0, printed)


def plain(text: str) -> str:
    """Without line breaks, and without the braces that some versions put around arguments."""
    return " ".join(text.replace("{", "").replace("}", "").split())


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_of_the_verb_shows_its_options_and_the_verb_below(option: str) -> None:
    shown = plain(run("bake", option).stdout)
    assert "bake [OPTIONS] RECIPE" in shown
    assert "--dry-run" in shown and "See also: lowlat bake taste CAKE" in shown
    assert "itself" not in shown


def test_help_of_the_verb_below() -> None:
    shown = plain(run("bake", "taste", "--help").stdout)
    assert "bake taste [OPTIONS] CAKE..." in shown and "Taste what was baked." in shown


def test_help_of_the_program_has_one_line_for_the_verb() -> None:
    shown = run("--help").stdout
    assert "Bake what a recipe says." in shown and "taste" not in shown


def test_faults_of_usage_name_the_verb() -> None:
    missing = run("bake")
    assert missing.exit_code == 2 and "bake [OPTIONS] RECIPE" in plain(missing.stderr)
    unknown = run("bake", "a.toml", "--sauce")
    assert unknown.exit_code == 2 and "No such option: --sauce" in unknown.stderr
