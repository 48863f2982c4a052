"""Drawn tensors, and how far a kernel may be from the exact result."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import native

needs_native = pytest.mark.skipif(not native.available(), reason=native.reason())
LEVELS = native.levels()
every_level = pytest.mark.parametrize("level", LEVELS)


def every_pair_with_level(
    name: str, values: Sequence[Any], ids: Callable[[Any], str]
) -> pytest.MarkDecorator:
    """Parameters `name` and `level`: all pairs; the quick suite runs each value at one level, and
    each level for some values.
    """
    pairs = []
    for number, value in enumerate(values):
        for level in LEVELS:
            is_quick = level == LEVELS[number % len(LEVELS)]
            marks = () if is_quick else pytest.mark.slow
            pairs.append(pytest.param(value, level, id=f"{ids(value)}-{level}", marks=marks))
    return pytest.mark.parametrize((name, "level"), pairs)


UNIT = 2.0**-24
"""Largest relative error of one fp32 rounding."""
BF16_UNIT = 2.0**-8 * (1 + 2.0**-12)
"""Largest relative error of rounding to bf16 a number that carries a few fp32 errors."""
KINDS = ("normal", "wide", "huge", "tiny", "zero", "zero_row")

many = settings(max_examples=60, deadline=None)
rows = st.integers(0, 30)
columns = st.integers(1, 200)
outs = st.integers(1, 70)
kinds = st.sampled_from(KINDS)
gains = st.sampled_from([1.0, 1e-7, 0.02, 3e4])
"""Sizes of weights, from fp16's subnormal scales to its largest minima."""
seeds = st.integers(0, 2**31)


def draw(shape: tuple[int, ...], kind: str, seed: int) -> Tensor:
    """bf16 numbers: `wide` over 20 binades, `huge` about 1e30, `tiny` about 1e-30; zero rows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    match kind:
        case "wide":
            x *= torch.exp2(torch.randint(-10, 11, shape, generator=generator).float())
        case "huge":
            x *= 1e30
        case "tiny":
            x *= 1e-30
        case "zero":
            x *= 0
        case "zero_row":
            x[::2] = 0
    return x.to(torch.bfloat16)


def draw_weights(shape: tuple[int, int], gain: float, seed: int) -> Tensor:
    """fp32 matrix of deviation `gain` that int8 and int4 can hold; one row in seven is zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator).mul(gain).clamp(-6e4, 6e4)
    w[seed % 7 :: 7] = 0
    return w


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """|actual - exact| <= bound, element by element; equal infinities are no difference."""
    assert actual.shape == exact.shape
    exact, wide = exact.double(), actual.double()
    error = torch.where(wide == exact, 0.0, (wide - exact).abs())
    worst = (error - bound).flatten()
    assert bool((error <= bound).all()), (
        f"off by {error.flatten()[worst.argmax()]}, {bound.flatten()[worst.argmax()]} allowed"
    )


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    assert one.dtype == other.dtype and one.shape == other.shape
    if one.numel() > 0:
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@contextmanager
def thread_count(count: int) -> Iterator[None]:
    """More threads than processors too, so that every schedule is met anywhere."""
    before = native.threads()
    native.module().set_threads(count)
    try:
        yield
    finally:
        native.module().set_threads(before)


def assert_rows_stand_alone(op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Row i of a batch of any size, on any number of threads, has the bits of row i alone."""
    together = op(x)
    for first in range(len(x)):
        for count in (1, 5, 13):
            part = op(x[first : first + count].contiguous())
            assert_same_bits(part, together[first : first + count])
            if first + count > len(x):
                break
    for count in (1, 3):
        with thread_count(count):
            assert_same_bits(op(x), together)
