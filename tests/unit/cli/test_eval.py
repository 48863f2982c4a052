"""lowlat eval: the figures, as text and JSON."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lowlat.cli.eval import as_dict
from lowlat.engine.scoring import Score
from lowlat.utils.errors import UserError

Invoke = Callable[..., Result]


@pytest.fixture
def alphabet(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("abcdefg")
    return path


def test_figures_by_hand(lowlat: Invoke, alphabet: Path) -> None:
    """The likeliest of 263 tokens has logit 5, all others 0; six of seven letters are predicted."""
    result = lowlat("eval", "tiny", "--text", str(alphabet), "--window", "50", "--json")
    report = json.loads(result.stdout)
    nll = math.log(math.exp(5) + 262) - 5
    assert report["tokens"] == report["bytes"] == 6
    assert report["perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert report["bits_per_byte"] == pytest.approx(nll / math.log(2), rel=1e-6)


def test_each_window_gives_its_first_token_away(lowlat: Invoke, alphabet: Path) -> None:
    result = lowlat("eval", "tiny", "--text", str(alphabet), "--window", "3", "--json")
    assert json.loads(result.stdout)["tokens"] == 4


def test_without_a_window_it_is_that_of_the_context(lowlat: Invoke, alphabet: Path) -> None:
    """Regression: a default that no model of a short context could take."""
    report = json.loads(lowlat("eval", "tiny", "--text", str(alphabet), "--json").stdout)
    assert report["window"] < 1024 and report["tokens"] == 6


def test_a_loss_beyond_what_a_perplexity_can_say() -> None:
    assert Score(window=8, tokens=2, bytes=2, nll=1419.0).perplexity > 1e300
    assert Score(window=8, tokens=2, bytes=2, nll=1420.0).perplexity == math.inf
    assert math.isnan(Score(window=8, tokens=2, bytes=2, nll=math.nan).perplexity)


def test_numbers_that_are_not_finite_are_null() -> None:
    for nll in (math.nan, 1e6, math.inf):
        score = Score(window=8, tokens=7, bytes=7, nll=nll)
        told = as_dict(score)
        assert told["perplexity"] is None
        assert (told["bits_per_byte"] is None) == (nll != 1e6)


def test_loads_of_experts_are_counted_in_one_process(lowlat: Invoke, alphabet: Path) -> None:
    counting = ["--expert-loads", "loads.json", "--parallel", "pipeline=2"]
    result = lowlat("eval", "tiny", "--text", str(alphabet), *counting)
    assert isinstance(result.exception, UserError)
    assert "leave out --parallel" in str(result.exception)


def test_text_form(lowlat: Invoke, alphabet: Path) -> None:
    result = lowlat("eval", "tiny", "--text", str(alphabet), "--window", "50")
    assert "perplexity" in result.stdout and "bits per byte" in result.stdout


@pytest.mark.parametrize("name", ["absent.txt", "."])
def test_unreadable_files_are_named(lowlat: Invoke, tmp_path: Path, name: str) -> None:
    result = lowlat("eval", "tiny", "--text", str(tmp_path / name))
    assert isinstance(result.exception, UserError)
    assert str(tmp_path / name) in str(result.exception)
