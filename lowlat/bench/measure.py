"""Interleaved measurement: each round runs every case in every program, in rotating order (ABAB).

A round measures a case in all programs before the next case, and the machine's peak rates. Each
round starts with another program.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from lowlat.bench.benchmark_plan import BenchmarkCase
from lowlat.peers.worker import TIMEOUT, PeerError
from lowlat.utils.progress import Progress

STEPS = 32
"""Maximum decode steps of a sample."""
STEP_SECONDS = 2.0
"""Maximum seconds of a decode sample of more than two steps."""
CASE_SECONDS = 45.0
"""A program that has spent these seconds on a case skips it in later rounds."""
LONG_PROMPT = 32768
"""Up to this many prompt tokens the timeout is constant; beyond, it grows quadratically."""


@runtime_checkable
class Measured(Protocol):
    """A program that answers requests: a `Worker`, or one in this process."""

    def ask(self, op: str, *, timeout: float = TIMEOUT, **arguments: Any) -> dict[str, Any]:
        """The answer to a request. Raises PeerError if there is none."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measurement of a case."""

    round: int
    tokens_per_second: float
    seconds: float
    """Wall time of the sample."""
    raw: dict[str, Any]
    """The worker's answer."""


@dataclass(kw_only=True, slots=True)
class CaseResult:
    """The samples of one program on one case, or the reason for their absence."""

    program: str
    case: BenchmarkCase
    samples: list[Sample] = field(default_factory=list)
    reason: str | None = None

    @property
    def rates(self) -> list[float]:
        return [sample.tokens_per_second for sample in self.samples]

    @property
    def median(self) -> float | None:
        """Tokens per second (tok/s), the median over the rounds."""
        return statistics.median(self.rates) if self.samples else None

    @property
    def spread(self) -> float | None:
        """(largest - smallest) / median."""
        return (max(self.rates) - min(self.rates)) / self.median if self.median else None

    @property
    def peak_bytes(self) -> int | None:
        """Peak resident bytes over all samples; prefill only."""
        peaks = [sample.raw["peak_bytes"] for sample in self.samples if "peak_bytes" in sample.raw]
        return max(peaks, default=None)

    @property
    def is_due(self) -> bool:
        """Whether to measure the case in the next round."""
        return self.reason is None and sum(s.seconds for s in self.samples) < CASE_SECONDS


def measure(
    workers: Sequence[tuple[str, Measured]],
    cases: Sequence[BenchmarkCase],
    calibration: Measured,
    rounds: int,
    progress: Progress,
) -> tuple[list[CaseResult], list[dict[str, float]]]:
    """Results of all programs and cases, and the machine's rates of every round."""
    results = {
        (name, case): CaseResult(program=name, case=case) for case in cases for name, _ in workers
    }
    rates: list[dict[str, float]] = []
    with progress.task("measuring", rounds * len(results)) as task:
        for number in range(rounds):
            rates.append(calibration.ask("measure"))
            for case in cases:
                first = number % len(workers)
                for name, worker in [*workers[first:], *workers[:first]]:
                    result = results[name, case]
                    if result.is_due:
                        _sample(result, worker, number)
                    task.advance()
    return list(results.values()), rates


def median_rates(rates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every rate over the rounds."""
    return {name: statistics.median(taken[name] for taken in rates) for name in rates[0]}


def _sample(result: CaseResult, worker: Measured, number: int) -> None:
    """Measure once. An error becomes the result's reason; earlier samples are preserved."""
    case = result.case
    try:
        if case.kind == "prefill":
            timeout = TIMEOUT * max(1.0, (case.tokens / LONG_PROMPT) ** 2)
            raw = worker.ask("prefill", timeout=timeout, tokens=case.tokens)
            seconds, tokens = raw["seconds"], case.tokens
        else:
            raw = worker.ask("decode", context=case.tokens, steps=STEPS, seconds=STEP_SECONDS)
            seconds, tokens = sum(raw["step_seconds"]), len(raw["step_seconds"])
    except PeerError as error:
        result.reason = str(error)
        return
    result.samples.append(
        Sample(round=number, tokens_per_second=tokens / seconds, seconds=seconds, raw=raw)
    )
