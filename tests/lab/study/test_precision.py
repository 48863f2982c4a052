"""Losses relative to bf16's."""

import pytest
from lowlat_lab.study.cells import percent
from lowlat_lab.study.precision import relative
from lowlat_lab.study.resumable import RunResult


def ran(variant: str, losses: dict[int, float]) -> list[RunResult]:
    return [
        RunResult(variant=variant, seed=seed, result={"loss": loss})
        for seed, loss in losses.items()
    ]


def test_relative_losses_pair_seeds() -> None:
    runs = [*ran("bf16", {1: 4.0, 2: 5.0}), *ran("fp8", {1: 4.04, 2: 5.05, 3: 9.0})]
    found = relative(runs, "fp8", "bf16", "loss")
    assert found is not None and found.mean == pytest.approx(0.01)
    assert relative(runs, "bf16", "bf16", "loss") is None
    assert relative(runs, "fp32", "bf16", "loss") is None


def test_shares_as_text() -> None:
    assert percent({"mean": 0.00123, "half": 0.0005}) == "+0.12 % ± 0.05"
    assert percent({"mean": -0.01, "half": None}) == "-1.00 %"
    assert percent(None) == ""
