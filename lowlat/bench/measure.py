"""The measuring itself: rounds in which every program does every cell in turn, A B A B.

Within a round a cell is measured by all programs before the next cell comes, in an order that
turns by one per round; the machine's own rates are taken in every round too. Owns samples and
medians, no tables.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lowlat.bench.plan import Cell
from lowlat.bench.worker import TIMEOUT, Refused, Worker
from lowlat.utils.progress import Progress

STEPS = 32
"""Most steps of a sample of decoding."""
STEP_SECONDS = 2.0
"""A sample of decoding ends after this long (and at least two steps)."""
CELL_SECONDS = 45.0
"""A program that has spent this long on a cell does not repeat it in later rounds."""
LONG_PROMPT = 32768
"""Tokens up to which a prompt has the usual time; as attention does, it grows with the square."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One measurement of a cell."""

    round: int
    tokens_per_second: float
    seconds: float
    """All the clock saw."""
    raw: dict[str, Any]
    """The worker's answer."""


@dataclass(kw_only=True, slots=True)
class Row:
    """A cell as one program did it: samples, or the reason why there are none."""

    program: str
    cell: Cell
    samples: list[Sample] = field(default_factory=list)
    reason: str | None = None

    @property
    def rates(self) -> list[float]:
        return [sample.tokens_per_second for sample in self.samples]

    @property
    def median(self) -> float | None:
        """Tokens per second, the median over the rounds."""
        return statistics.median(self.rates) if self.samples else None

    @property
    def spread(self) -> float | None:
        """(largest - smallest) / median."""
        return (max(self.rates) - min(self.rates)) / self.median if self.median else None

    @property
    def peak_bytes(self) -> int | None:
        """Most memory resident in any sample; prompts only."""
        peaks = [sample.raw["peak_bytes"] for sample in self.samples if "peak_bytes" in sample.raw]
        return max(peaks, default=None)

    @property
    def is_due(self) -> bool:
        """Whether the cell is worth another round."""
        return self.reason is None and sum(s.seconds for s in self.samples) < CELL_SECONDS


def measure(
    workers: Sequence[tuple[str, Worker]],
    cells: Sequence[Cell],
    calibration: Worker,
    rounds: int,
    progress: Progress,
) -> tuple[list[Row], list[dict[str, float]]]:
    """Rows of all programs and cells, and the machine's rates of every round."""
    rows = {(name, cell): Row(program=name, cell=cell) for cell in cells for name, _ in workers}
    rates: list[dict[str, float]] = []
    with progress.task("measuring", rounds * len(rows)) as task:
        for number in range(rounds):
            rates.append(calibration.ask("measure"))
            for cell in cells:
                turn = number % len(workers)
                for name, worker in [*workers[turn:], *workers[:turn]]:
                    row = rows[name, cell]
                    if row.is_due:
                        _sample(row, worker, number)
                    task.advance()
    return list(rows.values()), rates


def median_rates(rates: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every rate over the rounds."""
    return {name: statistics.median(taken[name] for taken in rates) for name in rates[0]}


def _sample(row: Row, worker: Worker, number: int) -> None:
    """Measure once; a refusal becomes the row's reason, earlier samples stay."""
    cell = row.cell
    try:
        if cell.kind == "prefill":
            patience = TIMEOUT * max(1.0, (cell.tokens / LONG_PROMPT) ** 2)
            raw = worker.ask("prefill", timeout=patience, tokens=cell.tokens)
            seconds, tokens = raw["seconds"], cell.tokens
        else:
            raw = worker.ask("decode", context=cell.tokens, steps=STEPS, seconds=STEP_SECONDS)
            seconds, tokens = sum(raw["step_seconds"]), len(raw["step_seconds"])
    except Refused as refused:
        row.reason = str(refused)
        return
    row.samples.append(
        Sample(round=number, tokens_per_second=tokens / seconds, seconds=seconds, raw=raw)
    )
