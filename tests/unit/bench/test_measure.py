"""Rounds, turns, medians: who is measured when, and what becomes of errors."""

from typing import Any

import pytest

from lowlat.bench import measure
from lowlat.bench.benchmark_plan import BenchmarkCase
from lowlat.peers.worker import PeerError, Worker
from lowlat.utils.progress import SilentProgress

PROMPT, STEP = BenchmarkCase(kind="prefill", tokens=100), BenchmarkCase(kind="decode", tokens=50)


class Scripted(Worker):
    """Answers from a list of seconds, and writes itself into a common log."""

    def __init__(self, name: str, log: list[str], seconds: list[float]) -> None:
        self.name, self.log, self.script = name, log, seconds
        self.timeouts: list[float] = []

    def ask(self, op: str, *, timeout: float = 0.0, **arguments: Any) -> dict[str, Any]:
        self.log.append(f"{self.name} {op}")
        if op == "measure":
            return {"bandwidth": self.script.pop(0)}
        self.timeouts.append(timeout)
        took = self.script.pop(0)
        if took < 0:
            raise PeerError("too much for it")
        if op == "prefill":
            return {"seconds": took, "peak_bytes": int(took * 100)}
        return {"step_seconds": [took, took]}


def run(
    scripts: dict[str, list[float]], cases: list[BenchmarkCase], rounds: int
) -> tuple[list[measure.CaseResult], list[dict[str, float]], list[str]]:
    log: list[str] = []
    workers = [(name, Scripted(name, log, script)) for name, script in scripts.items()]
    machine = Scripted("machine", log, [1.0, 9.0, 4.0][:rounds])
    rows, rates = measure.measure(workers, cases, machine, rounds, SilentProgress())
    return rows, rates, log


def test_programs_take_turns_within_each_case() -> None:
    _, _, log = run({"a": [1.0] * 4, "b": [1.0] * 4}, [PROMPT, STEP], 2)
    assert log == [
        *("machine measure", "a prefill", "b prefill", "a decode", "b decode"),
        *("machine measure", "b prefill", "a prefill", "b decode", "a decode"),
    ]


def test_medians_and_spread() -> None:
    (prompt, step), rates, _ = run({"a": [1.0, 0.5, 2.0, 0.5, 4.0, 0.5]}, [PROMPT, STEP], 3)
    assert prompt.median == 50.0 and prompt.spread == (100 - 25) / 50
    assert prompt.peak_bytes == 400
    assert step.median == 2.0 and step.spread == 0.0 and step.peak_bytes is None
    assert measure.median_rates(rates) == {"bandwidth": 4.0}


def test_an_error_is_recorded_and_not_repeated() -> None:
    rows, _, log = run({"a": [1.0, 1.0], "b": [-1.0]}, [PROMPT], 2)
    assert rows[1].reason == "too much for it" and rows[1].median is None
    assert log.count("b prefill") == 1


def test_earlier_samples_survive_a_later_error() -> None:
    (row,), _, _ = run({"a": [2.0, -1.0]}, [PROMPT], 3)
    assert row.median == 50.0 and row.reason == "too much for it"


def test_long_cases_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CASE_SECONDS", 10.0)
    (row,), _, _ = run({"a": [6.0, 6.0]}, [PROMPT], 3)
    assert len(row.samples) == 2 and row.reason is None


def test_long_prompts_have_longer() -> None:
    """Attention grows with the square of a prompt."""
    worker, machine = Scripted("a", [], [1.0] * 3), Scripted("machine", [], [1.0])
    cases = [BenchmarkCase(kind="prefill", tokens=tokens) for tokens in (2048, 32768, 131072)]
    measure.measure([("a", worker)], cases, machine, 1, SilentProgress())
    assert worker.timeouts == [900.0, 900.0, 14400.0]
