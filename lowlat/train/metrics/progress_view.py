"""Progress of a training: smoothed losses, remaining time, and the plain view, lines on stderr."""

import math
import sys
import time
from collections import deque
from typing import final

from lowlat.train.metrics.formatting import clock, count, memory, rate, utilisation
from lowlat.train.metrics.metrics_log import MetricsLog
from lowlat.train.metrics.record import (
    EvalRecord,
    ExpertRecord,
    IndexerRecord,
    StartRecord,
    StepRecord,
)

FIGURES = {
    "loss": "loss",
    "divergence": "KL",
    "layer_error": "layers",
    "rollouts.reward": "reward",
    "rollouts.length": "length",
    "rollouts.entropy": "entropy",
    "rollouts.kl": "KL",
    "rollouts.clipped": "clipped",
    "rollouts.no_signal": "no signal",
}
"""Smoothed fields of steps, with their labels."""
_SMOOTHING = 0.9
"""Decay of the exponential moving average; about ten steps."""
_WINDOW_SECONDS = 600.0
"""Window of the throughput behind the remaining time, long enough to include evaluations."""
PLAIN_SECONDS = 30.0
"""Seconds between two lines about steps."""


@final
class ProgressTracker:
    """Tracks a run record by record."""

    def __init__(self, start: StartRecord) -> None:
        self.start = start
        self.last: StepRecord | None = None
        """The latest step."""
        self.evaluation: EvalRecord | None = None
        """The latest evaluation."""
        self._means: dict[str, tuple[float, float]] = {}
        self._recent: deque[tuple[float, int]] = deque()

    def step(self, record: StepRecord) -> None:
        self.last = record
        for name in FIGURES:
            value = _value(record, name)
            if value is None:
                self._means.pop(name, None)
            else:
                mean, weight = self._means.get(name, (0.0, 0.0))
                added = 1 - _SMOOTHING
                self._means[name] = (_SMOOTHING * mean + added * value, _SMOOTHING * weight + added)
        self._recent.append((record.seconds, record.tokens))
        while len(self._recent) > 2 and record.seconds - self._recent[0][0] > _WINDOW_SECONDS:
            self._recent.popleft()

    @property
    def figures(self) -> dict[str, float]:
        """Exponential moving averages of those FIGURES that the latest step has."""
        return {FIGURES[name]: mean / weight for name, (mean, weight) in self._means.items()}

    @property
    def seconds_left(self) -> float | None:
        """Estimated remaining seconds at the recent throughput, evaluations included; None before
        the first step.
        """
        if self.last is None:
            return None
        (first, before), (last, after) = self._recent[0], self._recent[-1]
        is_single = last <= first
        speed = self.last.tokens_per_second if is_single else (after - before) / (last - first)
        return max(0, self.start.tokens_total - self.last.tokens) / speed if speed > 0 else None


def _value(record: StepRecord, name: str) -> float | None:
    """The field `name` of FIGURES."""
    if not name.startswith("rollouts."):
        return getattr(record, name)
    if record.rollouts is None:
        return None
    value = getattr(record.rollouts, name.removeprefix("rollouts."))
    # NaN: rewards that all failed
    return None if value is None or math.isnan(value) else value


@final
class PlainView(MetricsLog):
    """Prints a line every half minute and one per evaluation and note, for logs and pipes.

    It shows no status.
    """

    def __init__(self, seconds: float = PLAIN_SECONDS) -> None:
        self._every = seconds
        self._shown_at = -seconds
        self._unseen = False
        self._pace: ProgressTracker | None = None

    def start(self, record: StartRecord) -> None:
        self._pace = ProgressTracker(record)
        self.note(heading(record))

    def step(self, record: StepRecord) -> None:
        assert self._pace is not None
        self._pace.step(record)
        self._unseen = True
        is_last = record.step >= self._pace.start.total_steps
        if is_last or time.monotonic() - self._shown_at >= self._every:
            self._show(self._pace)

    def evaluation(self, record: EvalRecord) -> None:
        self.note(f"step {record.step:,}: {evaluation_text(record)}")

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def status(self, text: str) -> None:
        pass

    def close(self) -> None:
        if self._unseen and self._pace is not None:
            self._show(self._pace)

    def _show(self, pace: ProgressTracker) -> None:
        self._shown_at, self._unseen = time.monotonic(), False
        self.note(line(pace))


def figure_text(label: str, value: float) -> str:
    """One of `ProgressTracker.figures`, with its decimal places."""
    return f"{value:.{1 if label == FIGURES['rollouts.length'] else 4}f}"


def heading(record: StartRecord) -> str:
    """Name, steps, tokens and facts of a run in one line."""
    begun = f"from step {record.step:,}, " if record.step else ""
    facts = "".join(f", {name} {_fact(value)}" for name, value in record.facts.items())
    size = f"{record.total_steps:,} steps, {count(record.tokens_total)} tokens"
    return f"{record.name}: {begun}{size}{facts}"


def line(pace: ProgressTracker) -> str:
    """The latest step in one line; there must be one."""
    last = pace.last
    assert last is not None
    parts = [
        f"step {last.step:,}/{pace.start.total_steps:,}",
        *(f"{name} {figure_text(name, value)}" for name, value in pace.figures.items()),
        *(f"mtp {loss:.4f}" for loss in last.mtp_losses),
        f"lr {last.learning_rate:.2e}",
        f"grad {last.grad_norm:.2f}",
        rate(last.tokens_per_second),
        *([f"MFU {utilisation(last.mfu)}"] if last.mfu is not None else []),
        memory(last.memory_bytes),
        *([_worst(last.experts)] if last.experts else []),
        *([_indexers(last.indexers)] if last.indexers else []),
        f"{clock(pace.seconds_left)} left",
    ]
    return "  ".join(parts)


def evaluation_text(record: EvalRecord) -> str:
    """An evaluation in words, such as 'held_out loss 3.3012 (1.021 bits/byte), mtp 3.6120' or
    'held_out_prompts pass@1 0.2500, pass@8 0.6250'.
    """
    if record.pass_at_k is not None:
        found = record.pass_at_k.pass_at.items()
        return f"{record.split} {', '.join(f'pass@{k} {value:.4f}' for k, value in found)}"
    bits = "" if record.bits_per_byte is None else f" ({record.bits_per_byte:.3f} bits/byte)"
    bits += "" if record.targets is None else f" per {record.targets}"
    mtp = "".join(f", mtp {loss:.4f}" for loss in record.mtp_losses)
    taught = "" if record.divergence is None else f", KL {record.divergence:.4f}"
    return f"{record.split} loss {record.loss:.4f}{bits}{mtp}{taught}"


def _worst(experts: tuple[ExpertRecord, ...]) -> str:
    worst = max(experts, key=lambda layer: layer.max_violation)
    return f"MaxVio {worst.max_violation:.2f} (layer {worst.layer})"


def _indexers(layers: tuple[IndexerRecord, ...]) -> str:
    """Mean KL divergence of the indexers, and the layer with the lowest recall."""
    worst = min(layers, key=lambda layer: layer.recall)
    kl = sum(layer.kl for layer in layers) / len(layers)
    return f"indexer KL {kl:.4f} recall {worst.recall:.3f} (layer {worst.layer})"


def _fact(value: str | int | float | bool | None) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return count(value) if isinstance(value, int) else f"{value:g}"
