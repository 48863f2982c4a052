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
        "weights": {"memory": 3e10 / bandwidth, "arithmetic": 1.0},
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


def limited(bounds: tuple[float, ...], share: float) -> dict[str, Any]:
    return {
        "share_of_serial_bound": share,
        "bound_seconds": {
            "weights": {"memory": bounds[0], "arithmetic": bounds[1]},
            "attention": {"memory": bounds[2], "arithmetic": bounds[3]},
        },
    }


@pytest.mark.parametrize(
    ("bounds", "limit"),
    [
        ((1.0, 2.0, 0.5, 0.7), ("weights, by arithmetic", 2.0)),
        ((1.0, 2.0, 0.5, 2.5), ("attention, by arithmetic", 2.8)),
        ((1.0, 2.0, 3.5, 2.5), ("attention, by memory bandwidth", 2.0)),
    ],
)
def test_limits(bounds: tuple[float, ...], limit: tuple[str, float]) -> None:
    """The speedup is that of the phase's own bound, whatever rates it is made of."""
    fewest = limited((2.0, 4.0, 7.0, 7.0), 0.9)
    assert scaling.limiting_phase(fewest, limited(bounds, 0.9)) == limit


@pytest.mark.parametrize(
    ("alone", "share", "limit"),
    [
        (0.7, 0.2, "barriers and serial parts"),
        (0.2, 0.2, "kernels below the roofline"),
        (0.1, 0.2, "kernels below the roofline"),
    ],
)
def test_barriers_limit_what_threads_slow(alone: float, share: float, limit: str) -> None:
    """A share of the bound that is as low with few threads is the kernels', not the barriers'."""
    bounds = (3.0, 2.0, 0.5, 2.5)
    found = scaling.limiting_phase(limited(bounds, alone), limited(bounds, share))
    assert found == (limit, None)


def test_barriers_have_no_peak_rate(curve: dict[str, Any]) -> None:
    slow = copy.deepcopy(curve["runs"])
    slow[1]["rows"][0]["share_of_serial_bound"] = 0.1
    case = scaling.case_scaling(slow)[0]
    assert case.limit == "barriers and serial parts" and case.resource_speedup is None
    one = scaling.case_scaling(slow[1:])[0]
    assert one.limit == "kernels below the roofline"


def test_the_table_has_the_peak_rates_of_the_dtype(curve: dict[str, Any]) -> None:
    runs = copy.deepcopy(curve["runs"])
    for results, int8 in zip(runs, (3e9, 9e9), strict=True):
        results["plan"]["dtype"] = "int8"
        results["calibration"]["median"] |= {"gemm_bf16": 2e9, "gemm_int8": int8}
    out = StringIO()
    found = {"threads": [1, 4], "cases": [], "runs": runs}
    scaling.show_scaling(found, Console(file=out, width=120))
    assert "gemm_int8" in out.getvalue() and "3.00x" in out.getvalue()


def test_the_curve_is_drawn(curve: dict[str, Any], tmp_path: Path) -> None:
    draw_scaling(curve, tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_threads_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowlat.ops.native.processors", lambda: 8)
    assert parse_threads("4,1, 2,4") == [1, 2, 4]
    for text in ("", "a", "0", "1,9", "-1"):
        with pytest.raises(UserError, match=r"^--threads "):
            parse_threads(text)
