"""Comparisons of two variants: verdicts by their intervals."""

from typing import Any

import pytest
from lowlat_lab.study.comparison import compare
from lowlat_lab.study.report import find_comparison
from lowlat_lab.study.resumable import RunResult


def ran(
    variant: str, losses: dict[int, float], windows: list[float] | None = None
) -> list[RunResult]:
    return [
        RunResult(
            variant=variant,
            seed=seed,
            result={"loss": loss, "window_losses": windows or [loss, loss]},
        )
        for seed, loss in losses.items()
    ]


def compared(left: dict[int, float], right: dict[int, float]) -> dict[str, Any]:
    (found,) = compare([*ran("a", left), *ran("b", right)], [("a", "b")], ["a", "b"])
    return found.as_json()


def test_a_difference_beyond_noise() -> None:
    item = compared({1: 3.0, 2: 4.0, 3: 5.0}, {1: 3.1, 2: 4.1, 3: 5.11})
    assert (item["verdict"], item["pooled_verdict"]) == ("lower", "lower")


def test_a_difference_within_noise() -> None:
    item = compared({1: 3.0, 2: 4.0, 3: 5.0}, {1: 3.1, 2: 3.9, 3: 5.1})
    assert item["verdict"] == "undecided"


def test_a_higher_loss() -> None:
    assert compared({1: 3.2, 2: 4.2}, {1: 3.1, 2: 4.1})["verdict"] == "higher"


def test_one_seed_is_undecided() -> None:
    item = compared({1: 3.0}, {1: 3.5})
    assert item["verdict"] == item["pooled_verdict"] == "undecided"


def test_text_error_is_of_the_difference() -> None:
    """Windows hard for both variants do not count: only what differs does."""
    runs = [*ran("a", {1: 5.0}, [1.0, 9.0]), *ran("b", {1: 5.1}, [1.2, 9.0])]
    (found,) = compare(runs, [("a", "b")], ["a", "b"])
    assert found.text_error == pytest.approx(0.1)


def test_arms_without_runs_are_not_compared() -> None:
    runs = [*ran("a", {1: 5.0}), RunResult(variant="b", seed=1, result=None, failure="x")]
    assert compare(runs, [("a", "b")], ["a", "b"]) == []


def test_comparisons_turn_round() -> None:
    item = compared({1: 3.2, 2: 4.2}, {1: 3.1, 2: 4.1})
    turned = find_comparison({"comparisons": [item]}, "b", "a")
    assert turned is not None and turned["verdict"] == "lower"
    assert turned["difference"]["mean"] == -item["difference"]["mean"]
    assert find_comparison({"comparisons": [item]}, "b", "c") is None
