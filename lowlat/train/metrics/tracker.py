"""Progress of a run for progress views: smoothed losses, throughput, remaining time."""

from collections import deque
from typing import final

from lowlat.train.metrics.record import EvalRecord, StartRecord, StepRecord

FIGURES = {"loss": "loss", "divergence": "KL", "layer_error": "layers"}
"""Smoothed fields of steps, with their labels."""
_SMOOTHING = 0.9
"""Decay of the exponential moving average; about ten steps."""
_WINDOW_SECONDS = 600.0
"""Window of the throughput behind the remaining time, long enough to include evaluations."""


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
        """Add the next step."""
        self.last = record
        for name in FIGURES:
            value = getattr(record, name)
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
