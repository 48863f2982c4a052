"""Scoring of completions in a thread of its own, while the engine samples others."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from types import TracebackType
from typing import final

from lowlat.train.rewards.sample import Sample, Score
from lowlat.train.rewards.workers import RewardWorkers


@final
class BackgroundScoring:
    """Scores groups of samples, which are added in any order. Use as a context manager."""

    def __init__(self, rewards: RewardWorkers) -> None:
        self._rewards = rewards
        self._thread = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._waiting: dict[int, Sequence[Sample]] = {}
        self._scores: dict[int, list[list[Score]]] = {}
        self._calls: list[Future[None]] = []

    def __enter__(self) -> "BackgroundScoring":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def add(self, number: int, samples: Sequence[Sample]) -> None:
        """Score `samples`, group `number`."""
        with self._lock:
            self._waiting[number] = samples
        self._calls.append(self._thread.submit(self._score_waiting))

    def scores(self) -> dict[int, list[list[Score]]]:
        """The scores of all added groups by number. Raises the errors of `RewardWorkers.score`."""
        for call in self._calls:
            call.result()
        return self._scores

    def _score_waiting(self) -> None:
        """All groups that wait, in one call: a slow sample delays no others than it must."""
        with self._lock:
            groups, self._waiting = self._waiting, {}
        samples = [sample for own in groups.values() for sample in own]
        scores = iter(self._rewards.score(samples) if samples else [])
        for number, own in groups.items():
            self._scores[number] = [next(scores) for _ in own]
