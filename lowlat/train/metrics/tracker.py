"""How a run is getting on: its smoothed figures, how fast it is, and when it will be done.

Owns the arithmetic over the latest records, which the live view and the plain lines share.
"""

from collections import deque
from typing import final

from lowlat.train.metrics.record import EvalRecord, StartRecord, StepRecord

FIGURES = {"loss": "loss", "divergence": "KL", "layer_error": "layers"}
"""Fields of steps that are smoothed, and what people read."""
_SMOOTHING = 0.9
"""Weight of what came before in smoothed figures; about ten steps are seen at once."""
_WINDOW_SECONDS = 600.0
"""The speed that the remaining time is told from: long enough to hold evaluations."""


@final
class ProgressTracker:
    """Follows a run record by record."""

    def __init__(self, start: StartRecord) -> None:
        self.start = start
        self.last: StepRecord | None = None
        """The latest step."""
        self.evaluation: EvalRecord | None = None
        """The latest evaluation."""
        self._means: dict[str, tuple[float, float]] = {}
        self._recent: deque[tuple[float, int]] = deque()

    def step(self, record: StepRecord) -> None:
        """Take the next step."""
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
        """Of FIGURES those that the latest step had: means that weigh recent steps more."""
        return {FIGURES[name]: mean / weight for name, (mean, weight) in self._means.items()}

    @property
    def tokens_per_second(self) -> float:
        """Recent speed, evaluations included; of the one step known so far, without."""
        if self.last is None:
            return 0.0
        (first, before), (last, after) = self._recent[0], self._recent[-1]
        return (after - before) / (last - first) if last > first else self.last.tokens_per_second

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all tokens of the recipe are read; None while no speed is known."""
        speed = self.tokens_per_second
        if self.last is None or speed <= 0:
            return None
        return max(0, self.start.tokens_total - self.last.tokens) / speed
