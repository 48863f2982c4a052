"""int8 and int4 weights: products against dequantized values, and quantization, at every level."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import native_kernels, quantized

from . import kernels
from .inputs import (
    UNIT,
    assert_same_bits,
    assert_within,
    columns,
    draw,
    draw_weights,
    every_level,
    gains,
    kinds,
    many,
    needs_native,
    outs,
    rows,
    seeds,
)
from .matrices import bf16_matrix, int4_matrix, int8_matrix

pytestmark = needs_native


@every_level
@many
@given(rows=rows, columns=columns, outs=outs, kind=kinds, gain=gains, seed=seeds)
def test_int8_and_int4_multiply_as_bf16(
    level: str, rows: int, columns: int, outs: int, kind: str, gain: float, seed: int
) -> None:
    """The bits of the product with the values, rounded to bf16."""
    x, w = draw((rows, columns), kind, seed), draw_weights((outs, columns), gain, seed + 1)
    int8, int4 = quantized.quantize_int8(w), quantized.quantize_int4(w)
    for matrix, values in (
        (int8_matrix(w), quantized.dequantize_int8(int8, outs, columns, torch.bfloat16)),
        (int4_matrix(w), quantized.dequantize_int4(int4, outs, columns, torch.bfloat16)),
    ):
        assert values.isfinite().all()
        out = kernels.linear(x, matrix, level=level)
        assert_same_bits(out, kernels.linear(x, bf16_matrix(values), level=level))


def group_sums(x: Tensor, w: Tensor) -> Tensor:
    """x . w for each group of 32 columns, [rows, outs, groups]."""
    x, w = (F.pad(t.double(), (0, -t.shape[1] % 32)).unflatten(1, (-1, 32)) for t in (x, w))
    return torch.einsum("rgc,ogc->rog", x, w)


def half_steps(x: Tensor) -> Tensor:
    """Half of the largest of 32 columns over 16256, and a little for fp32, for each column."""
    largest = F.pad(x.abs(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32)).amax(dim=-1)
    return largest.double().repeat_interleave(32, dim=1)[:, : x.shape[1]] / (2 * 16200)


@every_level
@many
@given(rows=rows, columns=columns, outs=outs, kind=kinds, gain=gains, seed=seeds)
def test_int8_and_int4_stream_exact_values(
    level: str, rows: int, columns: int, outs: int, kind: str, gain: float, seed: int
) -> None:
    """The GEMV path does not round weights: only fp32 rounding separates it from the exact values.

    A group's sum passes through integers of up to `largest`; 48 roundings bound it. With integer
    dot products activations are rounded, too, to the largest of their group over 16256.
    """
    x, w = draw((rows, columns), kind, seed), draw_weights((outs, columns), gain, seed + 1)
    int8, int4 = quantized.quantize_int8(w), quantized.quantize_int4(w)
    no_minimum = int4._replace(weight_minimum=torch.zeros_like(int4.weight_minimum))
    wide = (outs, columns, torch.float64)
    for matrix, scaled, minimum, largest, scale in (
        (int8_matrix(w), quantized.dequantize_int8(int8, *wide), None, 16 * 143 + 143, int8[1]),
        (
            int4_matrix(w),
            quantized.dequantize_int4(no_minimum, *wide),
            by_column(int4.weight_minimum, outs, columns),
            143,
            int4.weight_scale,
        ),
    ):
        passed = x.abs(), largest * by_column(scale, outs, columns)
        added = group_sums(x, scaled).abs().sum(dim=-1)
        exact = x.double() @ scaled.T
        bound = 48 * group_sums(*passed).sum(dim=-1)
        if minimum is not None:
            exact = exact + x.double() @ minimum.T
            bound += 48 * group_sums(x.abs(), minimum.abs()).sum(dim=-1)
            added += group_sums(x, minimum).abs().sum(dim=-1)
        bound += (2 * columns / 32 + 4) * added
        if level in ("amx", "avx512"):
            whole = scaled if minimum is None else scaled + minimum
            bound += group_sums(half_steps(x), whole.abs()).sum(dim=-1) / UNIT
        out = kernels.linear(x, matrix, is_decode=True, level=level)
        assert_within(out, exact, UNIT * bound + columns * 2.0**-125)


def by_column(numbers: Tensor, outs: int, columns: int) -> Tensor:
    """Scales or minima [tiles, groups, 16] in fp64, one per weight."""
    rows = numbers.double().transpose(1, 2).flatten(0, 1)[:outs]
    return rows.repeat_interleave(32, dim=1)[:, :columns]


PACKERS = [
    (native_kernels.quantize_int8, quantized.quantize_int8),
    (native_kernels.quantize_int4, quantized.quantize_int4),
]
dtypes = st.sampled_from([torch.bfloat16, torch.float32])
bad_numbers = st.sampled_from([None, torch.nan, torch.inf, -torch.inf, 1e38, -1e6])


def assert_packed_alike(found: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Equal bit for bit. A group that does not fit must show in both; its other numbers mean
    nothing. Returns which groups of which rows fit.
    """
    (weight, *numbers), (wanted_weight, *wanted) = found, expected
    fits = torch.stack(wanted).isfinite().all(dim=0)
    assert torch.equal(torch.stack(numbers).isfinite().all(dim=0), fits)
    for number, exact in zip(numbers, wanted, strict=True):
        assert torch.equal(number[fits], exact[fits])
    assert weight.shape == wanted_weight.shape and weight.dtype == wanted_weight.dtype
    # tiles x groups x steps x rows x bytes -> tiles x groups x rows x steps x bytes
    assert torch.equal(weight.transpose(2, 3)[fits], wanted_weight.transpose(2, 3)[fits])
    return fits


@every_level
@many
@given(outs=outs, columns=columns, gain=gains, seed=seeds, dtype=dtypes, bad=bad_numbers)
def test_packing(
    level: str,
    outs: int,
    columns: int,
    gain: float,
    seed: int,
    dtype: torch.dtype,
    bad: float | None,
) -> None:
    """As the definition packs, of any height and width, with one number that may fit nothing."""
    dense = draw_weights((outs, columns), gain, seed).to(dtype)
    row, column = seed % outs, seed % columns
    if bad is not None:
        dense[row, column] = bad
    for pack, define in PACKERS:
        fits = assert_packed_alike(pack(dense, level=level), define(dense))
        # int8 keeps no minima and reaches 127 times as far
        is_within = bad is None or (bad == -1e6 and define is quantized.quantize_int8)
        assert fits[row // 16, column // 32, row % 16] == is_within
        assert fits.logical_not().sum() == (not is_within)


@every_level
def test_packing_ties_and_the_ends_of_fp16(level: str) -> None:
    """Halves of a step, the smallest and the largest scales, -0.0: each in a group of its own."""
    halves = torch.arange(-126, 126).unfold(0, 31, 31) + 0.5
    int8_ties = torch.cat([torch.full((len(halves), 1), 127.0), halves], dim=1)
    int4_ties = torch.arange(32.0)[None] / 2 * (30 / 31)
    int4_ties[:, :16] = torch.tensor([0.0, 15.0, *(i + 0.5 for i in range(14))])
    spread = torch.linspace(-1, 1, 32)
    small = torch.exp2(torch.arange(-32.0, -9.0))[:, None] * spread
    most = 65504 * torch.tensor([[0.99], [1.0], [1.0002], [1.0003], [1.01]])
    large = torch.cat([most * spread, most * spread * 127, most * spread.abs() * 15])
    zeros = torch.tensor([[0.0, -0.0] * 16, [-0.0] * 32])
    dense = torch.cat([int8_ties, int4_ties, small, large, zeros])
    for pack, define in PACKERS:
        assert_packed_alike(pack(dense, level=level), define(dense))


@every_level
def test_packing_strided_rows(level: str) -> None:
    wide = torch.full((37, 90), torch.nan)
    wide[:, :77] = torch.randn(37, 77)
    for pack, define in PACKERS:
        assert assert_packed_alike(pack(wide[:, :77], level=level), define(wide[:, :77])).all()
