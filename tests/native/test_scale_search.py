"""Native search of scales, alone and with error feedback: errors those of the reference
implementations, bits those of every other level."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import calibrated_quantization, native, native_kernels
from lowlat.ops.calibrated_quantization import ActivationCovariance, quantize_calibrated
from lowlat.ops.quantized import (
    Int4Weight,
    dequantize_int4,
    dequantize_int8,
    int4_groups,
    int4_values,
    int8_groups,
    int8_values,
    quantize_int4,
    quantize_int8,
)
from lowlat.ops.weighted_quantization import (
    INT8_SHRINKS,
    LOW_SHRINKS,
    REFITS,
    in_groups,
    int4_search,
    int8_search,
    quantize_int4_weighted,
    quantize_int8_weighted,
)

from .inputs import needs_native, seeds

pytestmark = needs_native

LEVELS = native.levels()
few = settings(max_examples=15, deadline=None)


def drawn(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows with outliers, and the importance of their columns."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.randn(rows, columns, generator=generator).mul(0.5).exp()
    return weight, torch.randn(columns, generator=generator).exp()


def weighted_error(values: Tensor, groups: Tensor, importance: Tensor) -> Tensor:
    return ((values - groups).double().square() * in_groups(importance).double()).sum()


@pytest.mark.parametrize("level", LEVELS)
@few
@given(seed=seeds, tiles=st.integers(1, 3), columns=st.integers(1, 100))
def test_int4(level: str, seed: int, tiles: int, columns: int) -> None:
    rows, importance = drawn(seed, 16 * tiles, columns)
    groups = int4_groups(rows)
    expected = int4_search(groups, in_groups(importance))
    found = native_kernels.int4_search(rows, importance, LOW_SHRINKS, REFITS, level=level)
    errors = []
    for scale, minimum in (expected, found):
        q = int4_values(groups, scale.float(), minimum.float())
        values = q * scale.float()[..., None] + minimum.float()[..., None]
        errors.append(weighted_error(values, groups, importance))
    assert abs(errors[1] - errors[0]) <= 1e-3 * errors[0]
    same = (expected[0] == found[0]) & (expected[1] == found[1])
    assert same.float().mean() > 0.7 or same.numel() < 40


@pytest.mark.parametrize("level", LEVELS)
@few
@given(seed=seeds, tiles=st.integers(1, 3), columns=st.integers(1, 100))
def test_int8(level: str, seed: int, tiles: int, columns: int) -> None:
    rows, importance = drawn(seed, 16 * tiles, columns)
    groups = int8_groups(rows)
    expected = int8_search(groups, in_groups(importance), torch.float16)
    found = native_kernels.int8_search(rows, importance, INT8_SHRINKS, REFITS, level=level).float()
    errors = [
        weighted_error(int8_values(groups, scale) * scale[..., None], groups, importance)
        for scale in (expected, found)
    ]
    assert abs(errors[1] - errors[0]) <= 1e-3 * errors[0]


def factor_of(seed: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    inputs = inputs @ torch.randn(columns, columns, generator=generator)
    return ActivationCovariance(inputs.T @ inputs / len(inputs)).factor


@pytest.mark.parametrize("level", LEVELS)
@few
@given(seed=seeds, tiles=st.integers(1, 3), columns=st.integers(1, 128))
def test_feedback(level: str, seed: int, tiles: int, columns: int) -> None:
    """Errors belong to the returned values, and are as small as the reference's."""
    rows, factor = drawn(seed, 16 * tiles, columns)[0], factor_of(seed, columns)
    _, _, _, expected = calibrated_quantization.feedback_block(rows, factor)
    found = native_kernels.feedback_block(rows, factor, LOW_SHRINKS, REFITS, level=level)
    q, scale, minimum, errors = found
    assert set(q.unique().tolist()) <= set(range(16))
    values = (q * scale.float()[..., None] + minimum.float()[..., None]).flatten(1)[:, :columns]
    assert torch.allclose(errors @ factor, rows - values, atol=2e-4 * float(rows.abs().max()))
    assert not q.flatten(1)[:, columns:].any()
    total, own = expected.double().square().sum(), errors.double().square().sum()
    assert own <= 1.1 * total


@pytest.mark.parametrize("name", ["int4", "int8", "feedback"])
def test_levels_agree_bit_for_bit(name: str) -> None:
    """The factor is a block of a wider one, whose rows are further apart."""
    rows, importance = drawn(1, 64, 128)
    rows[5, 7], rows[20, :64] = 0.0, 0.25
    factor = factor_of(5, 160)[32:160, 32:160]

    def run(level: str) -> tuple[Tensor, ...]:
        search: Any = {"shrinks": LOW_SHRINKS, "refits": REFITS, "level": level}
        match name:
            case "int4":
                return native_kernels.int4_search(rows, importance, **search)
            case "int8":
                search["shrinks"] = INT8_SHRINKS
                return (native_kernels.int8_search(rows, importance, **search),)
            case _:
                return native_kernels.feedback_block(rows, factor, **search)

    first, *others = (run(level) for level in LEVELS)
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("level", LEVELS)
def test_rows_stand_alone(level: str) -> None:
    """A row's numbers depend neither on the other rows nor on its place."""
    rows, factor = drawn(2, 48, 96)[0], factor_of(2, 96)
    together = native_kernels.feedback_block(rows, factor, LOW_SHRINKS, REFITS, level=level)
    apart = torch.zeros(16, 200)
    apart[3, :96] = rows[20]
    alone = native_kernels.feedback_block(apart[:, :96], factor, LOW_SHRINKS, REFITS, level=level)
    assert all(torch.equal(one[20], two[3]) for one, two in zip(together, alone, strict=True))


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_quantized_values_lose_nothing(name: str) -> None:
    plain: Any = quantize_int4 if name == "int4" else quantize_int8
    dequantize: Any = dequantize_int4 if name == "int4" else dequantize_int8
    weighted: Any = quantize_int4_weighted if name == "int4" else quantize_int8_weighted
    weight, importance = drawn(3, 50, 96)
    values = dequantize(weighted(weight, importance), 50, 96)
    for again in (plain(values), weighted(values, importance.flip(0))):
        assert torch.equal(dequantize(again, 50, 96), values)


def test_no_row_is_worse_than_min_max() -> None:
    """More columns than a block, and fewer inputs than columns."""
    weight = drawn(4, 40, 300)[0]
    inputs = drawn(5, 100, 300)[0]
    covariance = inputs.T @ inputs / 100
    found = quantize_calibrated(weight, "int4", ActivationCovariance(covariance))
    assert isinstance(found, Int4Weight)
    damping = calibrated_quantization.DAMPING * covariance.diagonal().mean().double()
    damped = covariance.double() + damping * torch.eye(300, dtype=torch.float64)
    totals = []
    for packed in (quantize_int4(weight), found):
        change = (dequantize_int4(packed, 40, 300) - weight).double()
        totals.append(((change @ damped) * change).sum(1))
    assert (totals[1] <= totals[0] * (1 + 1e-3)).all()
    assert totals[1].sum() < 0.8 * totals[0].sum()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e8])
def test_values_out_of_range_show_in_the_scales(value: float) -> None:
    weight, importance = drawn(6, 20, 64)
    weight[3, 5] = value
    packs = [
        quantize_int4_weighted(weight, importance),
        quantize_int8_weighted(weight, importance),
        quantize_calibrated(weight, "int4", ActivationCovariance(torch.eye(64))),
    ]
    for packed in packs:
        assert not all(bool(part.float().isfinite().all()) for part in packed[1:])


def test_constant_and_empty_groups() -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 7] = -3.5, 2.0
    found = dequantize_int4(quantize_int4_weighted(weight, torch.zeros(64)), 4, 64)
    assert (found - weight).abs().max() < 1e-3 and not found[0].any()


def test_unfit_tensors_are_refused() -> None:
    rows = torch.zeros(16, 129)
    with pytest.raises(ValueError, match="too many columns for one block"):
        native_kernels.feedback_block(rows, torch.eye(129), LOW_SHRINKS, REFITS)
    with pytest.raises(ValueError, match="not whole tiles of 16"):
        native_kernels.int4_search(rows[:5], torch.ones(129), LOW_SHRINKS, REFITS)
    with pytest.raises(ValueError, match="importance has 3 elements"):
        numbers = torch.empty(16, 5, dtype=torch.float16)
        native.module().search_int8(rows, torch.ones(3), [1.0], 1, numbers)


@pytest.mark.parametrize("quantize", [quantize_int4_weighted, quantize_int8_weighted])
def test_transposed_rows(quantize: Any) -> None:
    """Regression: rows with a column stride, as a single head has, ended in an error."""
    rows, importance = drawn(3, 32, 48)
    found, wanted = quantize(rows.T.contiguous().T, importance), quantize(rows, importance)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
