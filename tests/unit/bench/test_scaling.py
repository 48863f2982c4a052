"""The scaling curve over threads: speedups and limits of made-up runs, and the table."""

import copy
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowlat.bench import scaling
from lowlat.bench.benchmark_plan import BenchmarkPlan, make_plan, parse_threads
from lowlat.bench.results_plot import draw_scaling
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress
from tests.unit.bench.test_results import build


def results(threads: int, *, rate: float, bandwidth: float) -> dict[str, Any]:
    """The results of a run with `threads` threads, whose first case reaches `rate`."""
    made = copy.deepcopy(build())
    own = made["rows"][0]
    own["tokens_per_second"] = rate
    own["share_of_serial_bound"] = 0.8
    own["bound_seconds"] = {
        "weights": {"memory": 3.0, "arithmetic": 1.0},
        "attention": {"memory": 0.5, "arithmetic": 0.7},
    }
    made["plan"]["threads"] = threads
    made["calibration"]["median"]["bandwidth"] = bandwidth
    return made


@pytest.fixture
def curve(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def run(model: str, plan: BenchmarkPlan, progress: object) -> dict[str, Any]:
        threads = plan.threads
        return results(threads, rate=10.0 * threads**0.5, bandwidth=1e10 * (1 + 0.1 * threads))

    monkeypatch.setattr("lowlat.bench.scaling.run.bench", run)
    plan = make_plan(prefill="8", decode="8", threads=1)
    return scaling.bench_scaling("model", plan, [1, 4], SilentProgress())


def test_the_curve_names_the_limiting_phase(curve: dict[str, Any]) -> None:
    case = curve["cases"][0]
    assert case["tokens_per_second"] == [10.0, 20.0]
    assert case["speedup"] == 2.0
    assert case["limit"] == "weights, by memory bandwidth"
    assert case["resource_speedup"] == pytest.approx(1.4 / 1.1)
    out = StringIO()
    scaling.show_scaling(curve, Console(file=out, width=120))
    assert "2.00x" in out.getvalue() and "weights, by memory bandwidth (1.27x)" in out.getvalue()


@pytest.mark.parametrize(
    ("bounds", "share", "limit"),
    [
        ((1.0, 2.0, 0.5, 0.7), 0.9, ("weights, by arithmetic", "gemm_bf16")),
        ((1.0, 2.0, 0.5, 2.5), 0.9, ("attention, by arithmetic", "gemm_bf16")),
        ((1.0, 2.0, 3.5, 2.5), 0.9, ("attention, by memory bandwidth", "bandwidth")),
        ((3.0, 2.0, 0.5, 2.5), 0.2, ("barriers and serial parts", "bandwidth")),
    ],
)
def test_limits(bounds: tuple[float, ...], share: float, limit: tuple[str, str]) -> None:
    row = {
        "share_of_serial_bound": share,
        "bound_seconds": {
            "weights": {"memory": bounds[0], "arithmetic": bounds[1]},
            "attention": {"memory": bounds[2], "arithmetic": bounds[3]},
        },
    }
    assert scaling.limiting_phase(row, "bf16") == limit


def test_the_curve_is_drawn(curve: dict[str, Any], tmp_path: Path) -> None:
    draw_scaling(curve, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_threads_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowlat.ops.native.processors", lambda: 8)
    assert parse_threads("4,1, 2,4") == [1, 2, 4]
    for text in ("", "a", "0", "1,9", "-1"):
        with pytest.raises(UserError, match=r"^--threads "):
            parse_threads(text)
