"""The calibration worker: sizes of its matrix products."""

import pytest
import torch

from lowlat.bench import calibration
from lowlat.bench.calibration import SIDES


@pytest.mark.parametrize("is_slow", [False, True])
def test_large_products_are_left_out_if_they_take_too_long(
    monkeypatch: pytest.MonkeyPatch, is_slow: bool
) -> None:
    sides: list[int] = []

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        sides.append(len(a))
        return a

    monkeypatch.setattr(torch, "mm", multiply)
    monkeypatch.setattr(calibration, "LONGEST_SECONDS", 0.0 if is_slow else 1e9)
    matrix = torch.zeros(max(SIDES), max(SIDES))
    assert calibration.product_rate(matrix, is_transposed=True) > 0
    assert set(sides) == ({min(SIDES)} if is_slow else set(SIDES))
