"""The report and what is drawn from it: ratios, shares, tables, plots."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowlat.bench import results, results_table
from lowlat.bench.benchmark_plan import BenchmarkCase, Program, make_plan
from lowlat.bench.inputs import BenchmarkInputs
from lowlat.bench.measure import CaseResult, Sample
from lowlat.bench.results_plot import draw
from lowlat.bench.roofline import time_bound
from tests import fakes

CONFIG = fakes.mla_config()
RATES = {"bandwidth": 1e9, "gemm_fp32": 1e9, "gemm_bf16": 2e9, "gemm_int8": 3e9}
NAMES = ("lowlat", "llama.cpp", "transformers")
AGREED: dict[str, Any] = {"fp32_difference": None, "error_against_fp32": None}
FACTS: dict[str, dict[str, Any]] = {
    "lowlat": {"cache_bytes_per_token": 68, "error_against_fp32": 0.0123},
    "llama.cpp": {"fp32_difference": 2e-7},
}


def row(program: str, case: BenchmarkCase, *rates: float, reason: str | None = None) -> CaseResult:
    samples = [
        Sample(round=number, tokens_per_second=rate, seconds=1.0, raw={"peak_bytes": 10**9})
        for number, rate in enumerate(rates)
    ]
    return CaseResult(program=program, case=case, samples=samples, reason=reason)


def build() -> dict[str, Any]:
    plan = make_plan(prefill="8", decode="16", dtype="bf16", threads=1)
    prompt, step = plan.cases
    rows = [
        row("lowlat", prompt, 90.0, 100.0, 120.0),
        row("llama.cpp", prompt, 50.0),
        row("transformers", prompt, 25.0),
        row("lowlat", step, 30.0),
        row("llama.cpp", step, reason="its cache is too large"),
        row("transformers", step, 40.0),
    ]
    inputs = BenchmarkInputs(model=Path("/models/small"), config=CONFIG, weights=None, plan=plan)
    return results.build(
        inputs,
        started=0.0,
        programs={name: AGREED | {"precision": "bf16"} | FACTS.get(name, {}) for name in NAMES},
        rows=rows,
        rates=[RATES],
        starts={"lowlat": [1.0, 3.0, 1.25]},
    )


def test_lowlat_is_set_against_the_fastest_peer_and_the_roofline() -> None:
    own = build()["rows"][0]
    assert own["tokens_per_second"] == 100.0 and own["spread"] == pytest.approx(0.3)
    assert (own["best_peer"], own["ratio_to_best_peer"]) == ("llama.cpp", 2.0)
    case = BenchmarkCase(kind="prefill", tokens=8)
    bound = time_bound(CONFIG, case, dtype="bf16", rates=RATES)
    assert own["roofline_tokens_per_second"] == pytest.approx(8 / bound.overlapped)
    assert own["share_of_roofline"] == pytest.approx(100 * bound.overlapped / 8)
    assert own["share_of_serial_bound"] == pytest.approx(100 * bound.serial / 8)
    assert own["bound_seconds"]["weights"]["memory"] == bound.weights.memory


def test_a_peer_without_a_figure_is_no_best_peer() -> None:
    rows = build()["rows"]
    assert rows[3]["best_peer"] == "transformers"
    assert rows[3]["ratio_to_best_peer"] == pytest.approx(0.75)
    assert rows[4]["tokens_per_second"] is None
    assert rows[4]["not_measured"] == "its cache is too large"


def test_the_report_is_json_with_samples_machine_and_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/lowlat", "bench", "a model"])
    found = json.loads(json.dumps(build()))
    assert [s["tokens_per_second"] for s in found["rows"][0]["samples"]] == [90.0, 100.0, 120.0]
    assert found["command"] == "lowlat bench 'a model'"
    assert found["machine"]["cores"] >= 1 and found["machine"]["versions"]["torch"]
    assert found["start_to_first_token"]["lowlat"]["seconds"] == 1.25
    assert found["calibration"]["rounds"] == [RATES]


def test_the_table_fits_a_terminal_and_says_what_is_missing() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    results_table.show(build(), console)
    text = console.export_text()
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert any(line.startswith("prefill 8 lowlat 100.0 ±15%") for line in lines)
    assert any(line.startswith("llama.cpp 50.0 ±0%") and "2.00x" in line for line in lines)
    assert "llama.cpp: its cache is too large: not measured: decode 16" in lines
    assert any("difference 2.0e-07" in line for line in lines)
    assert any("bf16 logits differ from fp32 by 1.2%" in line for line in lines)


@pytest.mark.parametrize("name", ["plot.svg", "plot.png"])
def test_the_plot_has_every_program_and_the_roofline(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    draw(build(), tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert len(content) > 5000
    if name.endswith("svg"):
        for label in (b"roofline", b"llama.cpp (bf16)", b"transformers (bf16)"):
            assert label in content


def test_no_peer_no_ratio() -> None:
    plan = make_plan(prefill="8", decode="", threads=1)
    assert plan.peers == () and isinstance(Program(name="vllm", python="p"), Program)
    assert results.best_peer([row("lowlat", plan.cases[0], 1.0)], plan.cases[0]) is None
