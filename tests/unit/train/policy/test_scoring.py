"""Scoring in a thread: scores come by group, and errors where scores are taken."""

import threading
from contextlib import closing
from typing import Any
from unittest.mock import create_autospec

import pytest

from lowlat.train.policy.scoring import BackgroundScoring
from lowlat.train.rewards.sample import Sample
from lowlat.train.rewards.workers import RewardWorkers
from lowlat.utils.errors import UserError


def samples(*texts: str) -> list[Sample]:
    return [Sample("p", text, {}) for text in texts]


def test_groups_that_wait_are_scored_together() -> None:
    started, released = threading.Event(), threading.Event()
    calls: list[list[str]] = []

    def score(found: list[Sample]) -> list[list[float]]:
        calls.append([sample.completion for sample in found])
        started.set()
        assert released.wait(60)
        return [[float(len(sample.completion))] for sample in found]

    rewards: Any = create_autospec(RewardWorkers, instance=True)
    rewards.score.side_effect = score
    with closing(BackgroundScoring(rewards.score)) as scoring:
        scoring.add(1, samples("a", "bb"))
        assert started.wait(60)
        scoring.add(2, samples("ccc"))
        scoring.add(0, samples("", "d"))
        released.set()
        assert scoring.scores() == {1: [[1.0], [2.0]], 2: [[3.0]], 0: [[0.0], [1.0]]}
    assert calls == [["a", "bb"], ["ccc", "", "d"]]


def test_errors_of_scoring_are_raised() -> None:
    rewards: Any = create_autospec(RewardWorkers, instance=True)
    rewards.score.side_effect = UserError("why")
    with (
        closing(BackgroundScoring(rewards.score)) as scoring,
        pytest.raises(UserError, match="why"),
    ):
        scoring.add(0, samples("a"))
        scoring.scores()
