"""lowlat-lab study: options, the dry run, exit codes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lowlat.utils.errors import UserError
from tests.unit.data.conftest import Make, make_folder, texts

__all__ = ["make_folder"]  # the fixture

Invoke = Callable[..., Result]


@pytest.fixture
def tokens(make_folder: Make) -> str:
    return str(make_folder(texts(90), held_out=texts(20)).path)


def test_dry_run_leaves_nothing_behind(lowlat_lab: Invoke, tokens: str, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    arguments = ("--data", tokens, "--out", str(out), "--size", "tiny", "--dry-run", "--quiet")
    result = lowlat_lab("study", "mtp", *arguments, "--seeds", "2", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["seeds"] == [1, 2] and found["steps"] == 30 and found["seconds"] > 0
    assert [variant["mtp_parameters"] > 0 for variant in found["variants"]] == [False, True]
    assert found["variants"][0]["parameters"] == found["variants"][1]["parameters"]
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--size", "huge"), "--size 'huge' is unknown"),
        (("--variants", "mha,x"), "--variants: 'x' is unknown"),
        (("--steps", "3", "--tokens", "5"), "give one of them"),
        (("--size", "tiny", "--page", "page.html"), "give a file that ends in .md"),
    ],
)
def test_faults(
    lowlat_lab: Invoke, tokens: str, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    common = ("--data", tokens, "--out", str(tmp_path / "runs"))
    result = lowlat_lab("study", "attention", *common, *arguments)
    assert result.exit_code != 0 and reason in str(result.exception)


@pytest.mark.parametrize("option", ["--out", "--page"])
def test_places_that_take_nothing_are_reported_before_training(
    lowlat_lab: Invoke, tokens: str, tmp_path: Path, option: str
) -> None:
    (tmp_path / "file").touch()
    place = {"--out": str(tmp_path / "runs"), "--page": str(tmp_path / "page.md")}
    place[option] = str(tmp_path / "file" / "page.md")
    common = ("--data", tokens, "--size", "tiny", "--quiet", "--seeds", "1", "--steps", "2")
    result = lowlat_lab("study", "mtp", *common, *(word for pair in place.items() for word in pair))
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(f"{option}: {tmp_path / 'file'}")
    assert not list(tmp_path.glob("runs/*")) and not (tmp_path / "page.md").exists()


@pytest.mark.slow
def test_a_study_from_the_command_line(lowlat_lab: Invoke, tokens: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = tmp_path / "docs" / "mtp.md"
    common = ("--data", tokens, "--out", str(tmp_path / "runs"), "--size", "tiny", "--quiet")
    result = lowlat_lab(
        "study", "mtp", *common, "--seeds", "1", "--steps", "2", "--page", str(page)
    )
    assert result.exit_code == 0, result.output
    assert "with MTP" in result.stdout and str(page) in result.stderr
    assert "--steps 2 --seeds 1\n" in page.read_text()
    assert (tmp_path / "runs" / "report.json").is_file()
