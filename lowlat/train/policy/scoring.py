"""Scoring of completions in a thread of its own, while the engine samples others."""

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Lock
from typing import Generic, TypeVar, final

from lowlat.train.rewards.sample import Sample

T = TypeVar("T")


@final
class BackgroundScoring(Generic[T]):
    """Scores groups of samples, which are added in any order."""

    def __init__(self, score: Callable[[Sequence[Sample]], list[list[T]]]) -> None:
        """score: what each function returns for each sample, as `RewardWorkers.score`."""
        self._score = score
        self._thread = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._waiting: dict[int, Sequence[Sample]] = {}
        self._scores: dict[int, list[list[T]]] = {}
        self._calls: list[Future[None]] = []

    def close(self) -> None:
        """End the thread, after the call that is running."""
        self._thread.shutdown(cancel_futures=True)

    def add(self, number: int, samples: Sequence[Sample]) -> None:
        """Score `samples`, group `number`."""
        with self._lock:
            self._waiting[number] = samples
        self._calls.append(self._thread.submit(self._score_waiting))

    def scores(self) -> dict[int, list[list[T]]]:
        """The scores of all added groups by number, except those taken by `finished`. Raises the
        errors of `score`.
        """
        for call in self._calls:
            call.result()
        return self._scores

    def finished(self, *, waits: bool) -> dict[int, list[list[T]]]:
        """Take the scores of groups that are complete; waits: for one, if any group was added.
        Raises the errors of `score`.
        """
        while True:
            ended = [call for call in self._calls if call.done()]
            for call in ended:
                call.result()
            self._calls = [call for call in self._calls if call not in ended]
            with self._lock:
                found, self._scores = self._scores, {}
            if found or not waits or not self._calls:
                return found
            wait(self._calls, return_when=FIRST_COMPLETED)

    def _score_waiting(self) -> None:
        """Score all groups that wait in one call, so that workers run samples of several groups."""
        with self._lock:
            groups, self._waiting = self._waiting, {}
        samples = [sample for own in groups.values() for sample in own]
        scores = iter(self._score(samples) if samples else [])
        with self._lock:
            for number, own in groups.items():
                self._scores[number] = [next(scores) for _ in own]
