"""Weighted scales: no worse than min-max, lossless for quantized values, equal for all threads."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import native
from lowlat.ops.quantized import (
    dequantize_int4,
    dequantize_int8,
    dequantize_rows,
    quantize_int4,
    quantize_int8,
    quantize_rows,
)
from lowlat.ops.weighted_quantization import (
    LEAST_IMPORTANCE,
    quantize_int4_weighted,
    quantize_int8_weighted,
    quantize_rows_weighted,
)

Dequantize = Callable[[Any, int, int], Tensor]
FORMATS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Dequantize]] = {
    "int4": (quantize_int4, quantize_int4_weighted, dequantize_int4),
    "int8": (quantize_int8, quantize_int8_weighted, dequantize_int8),
    "int8_rows": (quantize_rows, quantize_rows_weighted, lambda p, r, c: dequantize_rows(p)),
}


@pytest.fixture(autouse=True, scope="module")
def reference() -> Iterator[None]:
    """Native kernels are tested against these in tests/native/test_scale_search.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        yield


def drawn(seed: int, rows: int, columns: int, spread: float) -> tuple[Tensor, Tensor]:
    """Weights with outliers, and the importance of their columns."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.randn(rows, columns, generator=generator).mul(spread).exp()
    importance = torch.randn(columns, generator=generator).mul(2 * spread).exp()
    importance[:: seed % 5 + 2] *= seed % 2  # channels that are 0
    return weight, importance


def errors(weight: Tensor, importance: Tensor, values: Tensor, group: int) -> Tensor:
    """Weighted squared error of each group."""
    mean = importance.mean() if importance.any() else 1.0
    relative = (importance / mean).clamp(min=LEAST_IMPORTANCE)
    squares = (values - weight).double().square() * relative
    squares = torch.nn.functional.pad(squares, (0, -squares.shape[1] % group))
    return squares.unflatten(1, (-1, group)).sum(-1)


@pytest.mark.parametrize("name", FORMATS)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 40),
    columns=st.integers(1, 100),
    spread=st.floats(0, 2),
)
@settings(max_examples=25, deadline=None)
def test_no_group_is_worse_than_min_max(
    name: str, seed: int, rows: int, columns: int, spread: float
) -> None:
    plain, weighted, dequantize = FORMATS[name]
    weight, importance = drawn(seed, rows, columns, spread)
    group = columns if name == "int8_rows" else 32
    before, after = (
        errors(weight, importance, dequantize(packed, rows, columns), group)
        for packed in (plain(weight), weighted(weight, importance))
    )
    assert (after <= before * (1 + 1e-5) + 1e-12).all()


@pytest.mark.parametrize(("name", "most"), [("int4", 0.75), ("int8", 0.92), ("int8_rows", 0.97)])
def test_errors_are_smaller(name: str, most: float) -> None:
    plain, weighted, dequantize = FORMATS[name]
    weight, importance = drawn(1, 64, 256, 0.5)
    before, after = (
        errors(weight, importance, dequantize(packed, *weight.shape), 256).sum()
        for packed in (plain(weight), weighted(weight, importance))
    )
    assert 0.2 * before < after < most * before


def test_important_columns_are_closer() -> None:
    weight, importance = torch.randn(64, 256), torch.ones(256)
    importance[::8] = 1000.0
    found = dequantize_int4(quantize_int4_weighted(weight, importance), 64, 256)
    plain = dequantize_int4(quantize_int4_weighted(weight, torch.ones(256)), 64, 256)
    errors = [(values - weight).square()[:, ::8].mean() for values in (found, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_quantized_values_lose_nothing(name: str) -> None:
    """By min-max and by a search with another importance: a format goes through another file."""
    plain, weighted, dequantize = FORMATS[name]
    weight, importance = drawn(3, 50, 96, 1.0)
    first = weighted(weight, importance)
    values = dequantize(first, 50, 96)
    for again in (plain(values), weighted(values, importance.flip(0))):
        assert torch.equal(dequantize(again, 50, 96), values)


@pytest.mark.parametrize("name", FORMATS)
def test_threads_do_not_matter(name: str) -> None:
    _, weighted, _ = FORMATS[name]
    weight, importance = drawn(5, 600, 320, 0.7)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(weighted(weight, importance))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e8])
def test_values_out_of_range_show_in_the_scales(value: float) -> None:
    """Regression: a search that clips them silently."""
    weight = torch.randn(20, 64)
    weight[3, 5] = value
    for weighted in (quantize_int4_weighted, quantize_int8_weighted):
        packed = weighted(weight, torch.ones(64))
        assert not all(bool(part.float().isfinite().all()) for part in packed[1:])


def test_constant_and_empty_groups() -> None:
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 7] = -3.5, 2.0
    found = dequantize_int4(quantize_int4_weighted(weight, torch.zeros(64)), 4, 64)
    assert (found - weight).abs().max() < 1e-3 and not found[0].any()
