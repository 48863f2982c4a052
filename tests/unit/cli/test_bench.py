"""lowlat bench: its options, and where its report goes."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lowlat.bench import benchmark_plan as plan
from lowlat.cli import bench
from lowlat.utils.errors import UserError
from tests.unit.bench.test_results import build

Invoke = Callable[..., Result]


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[plan.BenchmarkPlan]:
    """Nothing is measured: a made-up report comes at once, and the plan is kept here."""
    seen: list[plan.BenchmarkPlan] = []

    def run(model: str, wanted: plan.BenchmarkPlan, progress: object) -> dict[str, Any]:
        seen.append(wanted)
        return build()

    monkeypatch.setattr("lowlat.bench.run.bench", run)
    return seen


def test_options_reach_the_plan(lowlat: Invoke, plans: list[plan.BenchmarkPlan]) -> None:
    arguments = ("--prefill", "64", "--decode", "", "--dtype", "int4", "--cache", "int8")
    result = lowlat("bench", "model", *arguments, "--threads", "1", "--rounds", "5")
    assert result.exit_code == 0, result.output
    assert plans == [
        plan.make_plan(prefill="64", decode="", dtype="int4", cache="int8", threads=1, rounds=5)
    ]


def test_defaults_are_those_of_the_plan(lowlat: Invoke, plans: list[plan.BenchmarkPlan]) -> None:
    """Regression: the verb's copies of the defaults drifting from the plan's."""
    lowlat("bench", "model")
    assert plans == [plan.make_plan()]
    assert (bench.PREFILL, bench.DECODE, bench.ROUNDS) == (plan.PREFILL, plan.DECODE, plan.ROUNDS)


def test_json_is_all_there_is_on_stdout(lowlat: Invoke, plans: list[plan.BenchmarkPlan]) -> None:
    report = json.loads(lowlat("bench", "model", "--json").stdout)
    assert report["rows"][0]["program"] == "lowlat"


def test_text_form(lowlat: Invoke, plans: list[plan.BenchmarkPlan]) -> None:
    assert "roofline" in lowlat("bench", "model").stdout


def test_out_keeps_results_and_plot(
    lowlat: Invoke, plans: list[plan.BenchmarkPlan], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    result = lowlat("bench", "model", "--out", str(tmp_path / "new" / "run"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "new" / "run" / "results.json").read_text())
    assert report["format"] == 1
    assert (tmp_path / "new" / "run" / "plot.svg").stat().st_size > 5000


def test_out_that_cannot_be_a_folder_is_named_before_measuring(
    lowlat: Invoke, plans: list[plan.BenchmarkPlan], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    result = lowlat("bench", "model", "--out", str(tmp_path / "file"))
    assert isinstance(result.exception, UserError) and "--out" in str(result.exception)
    assert plans == []


def test_out_that_cannot_be_written_is_named_before_measuring(
    lowlat: Invoke, plans: list[plan.BenchmarkPlan], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "results.json").mkdir()
    result = lowlat("bench", "model", "--out", str(tmp_path))
    assert isinstance(result.exception, UserError)
    assert "results.json cannot be written there" in str(result.exception)
    assert plans == []


def test_a_disk_that_fills_while_measuring_loses_no_report(
    lowlat: Invoke, plans: list[plan.BenchmarkPlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lowlat.bench.results_plot.draw", full)
    result = lowlat("bench", "model", "--out", str(tmp_path))
    assert isinstance(result.exception, UserError)
    assert "No space left on device" in str(result.exception) and "roofline" in result.stdout


def test_too_many_threads_are_refused(lowlat: Invoke, plans: list[plan.BenchmarkPlan]) -> None:
    result = lowlat("bench", "model", "--threads", "4096")
    assert isinstance(result.exception, UserError)
    assert "--threads 4096: this machine has" in str(result.exception)
    assert plans == []
