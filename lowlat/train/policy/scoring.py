"""Scoring of completions in a thread of its own, while the engine samples others."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import final

from lowlat.train.rewards.sample import Sample, Score
from lowlat.train.rewards.workers import RewardWorkers


@final
class BackgroundScoring:
    """Scores groups of samples, which are added in any order."""

    def __init__(self, rewards: RewardWorkers) -> None:
        self._rewards = rewards
        self._thread = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._waiting: dict[int, Sequence[Sample]] = {}
        self._scores: dict[int, list[list[Score]]] = {}
        self._calls: list[Future[None]] = []

    def close(self) -> None:
        """End the thread, after the call that is running."""
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
        """Score all groups that wait in one call, so that workers run samples of several groups."""
        with self._lock:
            groups, self._waiting = self._waiting, {}
        samples = [sample for own in groups.values() for sample in own]
        scores = iter(self._rewards.score(samples) if samples else [])
        for number, own in groups.items():
            self._scores[number] = [next(scores) for _ in own]
