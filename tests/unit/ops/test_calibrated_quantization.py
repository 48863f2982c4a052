"""int4 with error feedback: output errors below those of min-max, nothing lost twice."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import calibrated_quantization, native
from lowlat.ops.calibrated_quantization import (
    DAMPING,
    ActivationCovariance,
    quantize_calibrated,
)
from lowlat.ops.quantized import Int4Weight, dequantize_int4, quantize_int4
from lowlat.ops.weighted_quantization import quantize_int4_weighted


@pytest.fixture(autouse=True, scope="module")
def reference() -> Iterator[None]:
    """Native kernels are tested against these in tests/native/test_scale_search.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        yield


def drawn(seed: int, rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Weights with outliers, and the covariance of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.randn(rows, columns, generator=generator).mul(0.5).exp()
    inputs = torch.randn(tokens, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator)
    return weight, inputs.T @ inputs / tokens


def calibrated(weight: Tensor, covariance: Tensor) -> Int4Weight:
    found = quantize_calibrated(weight, "int4", ActivationCovariance(covariance))
    assert isinstance(found, Int4Weight)
    return found


def errors(weight: Tensor, covariance: Tensor, packed: Int4Weight) -> Tensor:
    """d H d^T of each row, with the damped H."""
    change = (dequantize_int4(packed, *weight.shape) - weight).double()
    damping = DAMPING * covariance.diagonal().mean().double()
    damped = covariance.double() + damping * torch.eye(len(covariance), dtype=torch.float64)
    return ((change @ damped) * change).sum(1)


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    columns=st.integers(1, 80),
    tokens=st.integers(1, 100),
)
@settings(max_examples=15, deadline=None)
def test_no_row_is_worse_than_min_max(seed: int, rows: int, columns: int, tokens: int) -> None:
    """Fewer tokens than columns included."""
    weight, covariance = drawn(seed, rows, columns, tokens)
    before = errors(weight, covariance, quantize_int4(weight))
    after = errors(weight, covariance, calibrated(weight, covariance))
    assert (after <= before * (1 + 1e-3) + 1e-6).all()


def test_feedback_beats_the_diagonal() -> None:
    weight, covariance = drawn(1, 64, 128, 1000)
    diagonal = quantize_int4_weighted(weight, covariance.diagonal())
    before = errors(weight, covariance, diagonal).sum()
    after = errors(weight, covariance, calibrated(weight, covariance)).sum()
    assert after < 0.75 * before


def test_feedback_crosses_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns move by the errors of all earlier blocks, as within one."""
    weight, covariance = drawn(6, 32, 192, 1000)
    totals = []
    for block in (32, 192):
        monkeypatch.setattr(calibrated_quantization, "BLOCK", block)
        totals.append(errors(weight, covariance, calibrated(weight, covariance)).sum())
    assert abs(totals[0] - totals[1]) < 0.01 * totals[1]


def test_quantized_values_lose_nothing() -> None:
    weight, covariance = drawn(2, 50, 77, 200)
    values = dequantize_int4(calibrated(weight, covariance), 50, 77)
    assert torch.equal(dequantize_int4(quantize_int4(values), 50, 77), values)
    again = calibrated(values, drawn(3, 1, 77, 100)[1])
    assert torch.equal(dequantize_int4(again, 50, 77), values)


def test_threads_do_not_matter() -> None:
    weight, covariance = drawn(4, 1500, 288, 500)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(calibrated(weight, covariance))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e8])
def test_values_out_of_range_show_in_the_scales(value: float) -> None:
    weight, covariance = drawn(5, 20, 64, 100)
    weight[3, 5] = value
    packed = calibrated(weight, covariance)
    assert not all(bool(part.float().isfinite().all()) for part in packed[1:])


def test_no_inputs_and_constant_rows() -> None:
    weight = torch.zeros(4, 64)
    weight[1] = -3.5
    found = dequantize_int4(calibrated(weight, torch.zeros(64, 64)), 4, 64)
    assert torch.equal(found, weight)
