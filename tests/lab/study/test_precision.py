"""Losses relative to bf16's, and what is said of the bound."""

import pytest
from lowlat_lab.study.conclusions import conclusions
from lowlat_lab.study.figures import percent
from lowlat_lab.study.precision import relative
from lowlat_lab.study.run import Ran


def ran(arm: str, losses: dict[int, float]) -> list[Ran]:
    return [Ran(arm=arm, seed=seed, result={"loss": loss}) for seed, loss in losses.items()]


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


@pytest.mark.parametrize(
    ("mean", "half", "said"),
    [
        (0.001, 0.001, "; within 0.25 %"),
        (-0.001, 0.001, "; within 0.25 %"),
        (-0.0021, 0.001, "; in the mean within 0.25 %"),
        (0.0001, None, "; in the mean within 0.25 %"),
        (0.003, 0.0001, "; not within 0.25 %"),
    ],
)
def test_the_bound(mean: float, half: float | None, said: str) -> None:
    share = {"mean": mean, "half": half}
    arm = {"name": "fp8", "label": "FP8", "loss_relative": share, "train_loss_relative": share}
    report = {"study": "precision", "arms": [arm], "comparisons": [], "seeds": [1, 2]}
    assert said in "\n".join(conclusions(report))
