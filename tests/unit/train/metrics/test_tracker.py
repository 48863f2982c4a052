"""Smoothed loss, remaining time, and figures as people read them."""

import math

import pytest

from lowlat.train.metrics.formatting import bars, clock, count, memory, rate, share, tick
from lowlat.train.metrics.progress_view import ProgressTracker
from tests.unit.train.metrics.records import start, step


def test_loss_is_a_mean_that_forgets() -> None:
    pace = ProgressTracker(start())
    assert pace.figures == {}
    pace.step(step(1, loss=4.0))
    assert pace.figures == {"loss": pytest.approx(4.0)}  # not pulled towards zero
    for number in range(2, 102):
        pace.step(step(number, loss=2.0))
    assert pace.figures == {"loss": pytest.approx(2.0, abs=1e-3)}


def test_figures_are_those_of_the_latest_step() -> None:
    """A phase that matches layers knows no loss, one that matches distributions no error of
    layers: what came before must not stay on the screen.
    """
    pace = ProgressTracker(start())
    pace.step(step(1, loss=None, layer_error=0.5))
    pace.step(step(2, loss=None, layer_error=0.5))
    assert pace.figures == {"layers": pytest.approx(0.5)}
    pace.step(step(3, loss=3.0, divergence=0.25))
    assert pace.figures == {"loss": pytest.approx(3.0), "KL": pytest.approx(0.25)}


def test_time_left_follows_tokens_and_pauses() -> None:
    """Regression: remaining time told from steps alone, wrong where batches grow or evaluations
    take their time.
    """
    pace = ProgressTracker(start(tokens_total=1000))
    assert pace.seconds_left is None
    pace.step(step(1, tokens=100, seconds=10.0, tokens_per_second=20.0))
    assert pace.seconds_left == pytest.approx(900 / 20)  # one step: its own speed
    pace.step(step(2, tokens=300, seconds=60.0, tokens_per_second=20.0))
    assert pace.seconds_left == pytest.approx(700 / (200 / 50))


def test_time_left_forgets_what_is_long_ago() -> None:
    pace = ProgressTracker(start(tokens_total=10_000))
    for number in range(1, 21):
        pace.step(step(number, tokens=number, seconds=100.0 * number))
    for number in range(21, 61):
        pace.step(step(number, tokens=100 * number, seconds=2000.0 + 100.0 * (number - 20)))
    assert pace.seconds_left == pytest.approx(10_000 - 6000)  # a token per second


def test_run_that_is_done_has_no_time_left() -> None:
    pace = ProgressTracker(start())
    pace.step(step(13, tokens=1300))
    assert pace.seconds_left == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "?"),
        (math.inf, "?"),
        (7, "0:07"),
        (59.7, "1:00"),
        (754, "12:34"),
        (13_510, "3:45:10"),
        (186_300, "2 d 03:45"),
    ],
)
def test_clock(seconds: float | None, text: str) -> None:
    assert clock(seconds) == text


def test_figures() -> None:
    assert [count(n) for n in (0, 9999, 12_345, 4_560_000, 163_840_000, 14_800_000_000_000)] == [
        "0",
        "9,999",
        "12.3K",
        "4.56M",
        "164M",
        "14.8T",
    ]
    assert [tick(x, 0) for x in (0.0, 0.002, 7500.0, 15_000.0, 1.5e6, -2e4)] == [
        "0",
        "0.002",
        "7,500",
        "15K",
        "1.5M",
        "-20K",
    ]
    assert (memory(812_000_000), memory(1_234_000_000)) == ("812 MB", "1.23 GB")
    assert (rate(5123.4), rate(12.34)) == ("5,123 tok/s", "12.3 tok/s")
    assert (share(0.428), share(None)) == ("43 %", "?")


def test_bars_are_half_high_at_the_mean() -> None:
    assert bars([0.25] * 4, 32) == "▄▄▄▄"
    assert bars([0.0, 0.125, 0.375, 0.5], 32) == "▁▂▆█"
    assert bars([0.7, 0.1, 0.1, 0.1], 32)[0] == "█"  # more than twice the mean
    assert bars([], 32) == ""
    assert bars([0.0, 0.0], 32) == "▁▁"


def test_many_experts_share_bars_and_none_is_hidden() -> None:
    load = [1 / 70] * 70
    load[33] = 5 / 70
    shown = bars(load, 32)
    assert len(shown) == 24  # three experts a bar
    assert shown[11] == "█" and shown.count("█") == 1
