"""GEMM and GEMV, y = x W^T: every weight storage at every level, against exact products."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import native, quantized
from lowlat.ops.fp8 import dequantize_blocks, quantize_blocks

from . import kernels
from .inputs import (
    UNIT,
    assert_rows_stand_alone,
    assert_same_bits,
    assert_within,
    columns,
    draw,
    every_level,
    kinds,
    many,
    needs_native,
    outs,
    rows,
    seeds,
)
from .matrices import (
    bf16_matrix,
    fp8_matrix,
    fp8_rows_matrix,
    int4_matrix,
    int8_matrix,
    int8_rows_matrix,
    quantize_fp8_rows,
)

pytestmark = needs_native

streams = st.booleans()


def bf16_bound(x: Tensor, w: Tensor) -> Tensor:
    """Two chains of columns / 2 rounded additions each; products below 2^-126 may vanish."""
    n = x.shape[1] / 2 + 4
    return n * UNIT * (x.double().abs() @ w.double().abs().T) + x.shape[1] * 2.0**-125


@every_level
@many
@given(rows=rows, columns=columns, outs=outs, kind=kinds, seed=seeds, stream=streams)
def test_bf16(
    level: str, rows: int, columns: int, outs: int, kind: str, seed: int, stream: bool
) -> None:
    x, w = draw((rows, columns), kind, seed), draw((outs, columns), "wide", seed + 1)
    out = kernels.linear(x, native.module().Matrix.bf16(w), is_decode=stream, level=level)
    assert_within(out, x.double() @ w.double().T, bf16_bound(x, w))


@every_level
@many
@given(rows=rows, columns=columns, outs=outs, seed=seeds, stream=streams)
def test_bf16_rows_of_a_wider_matrix(
    level: str, rows: int, columns: int, outs: int, seed: int, stream: bool
) -> None:
    """Rows with a stride, surrounded by NaN that must not be read."""
    x = draw((rows, columns), "normal", seed)
    wide = torch.full((outs, columns + 13), torch.nan, dtype=torch.bfloat16)
    wide[:, :columns] = draw((outs, columns), "normal", seed + 1)
    w = wide[:, :columns]
    out = kernels.linear(x, native.module().Matrix.bf16(w), is_decode=stream, level=level)
    assert_within(out, x.double() @ w.double().T, bf16_bound(x, w))


@every_level
@many
@given(
    rows=rows,
    columns=st.integers(1, 300),
    outs=st.integers(1, 300),
    seed=seeds,
    stream=streams,
)
def test_fp8(level: str, rows: int, columns: int, outs: int, seed: int, stream: bool) -> None:
    x = draw((rows, columns), "wide", seed)
    weight, scale = quantize_blocks(draw((outs, columns), "wide", seed + 1).float(), (128, 128))
    w = dequantize_blocks(weight, scale, (128, 128), torch.bfloat16)
    matrix = native.module().Matrix.fp8(weight.view(torch.uint8), scale)
    out = kernels.linear(x, matrix, is_decode=stream, level=level)
    assert_within(out, x.double() @ w.double().T, bf16_bound(x, w))


@every_level
def test_every_fp8_number(level: str) -> None:
    """All 256 bytes, subnormals and NaN included, times the identity."""
    weight = torch.arange(256, dtype=torch.uint8)[:, None]
    matrix = native.module().Matrix.fp8(weight, torch.ones(2, 1))
    out = kernels.linear(torch.ones(1, 1, dtype=torch.bfloat16), matrix, level=level)
    torch.testing.assert_close(
        out[0], weight[:, 0].view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True
    )


@every_level
@many
@given(rows=rows, columns=columns, outs=outs, kind=kinds, seed=seeds, stream=streams)
def test_int8_rows(
    level: str, rows: int, columns: int, outs: int, kind: str, seed: int, stream: bool
) -> None:
    x = draw((rows, columns), kind, seed)
    packed = quantized.quantize_rows(draw((outs, columns), "zero_row", seed + 1))
    matrix = native.module().Matrix.int8_rows(packed.weight, packed.weight_scale)
    out = kernels.linear(x, matrix, is_decode=stream, level=level)
    whole = packed.weight.bfloat16()
    scale = packed.weight_scale.double()
    bound = bf16_bound(x, whole) * scale
    exact = x.double() @ whole.double().T * scale
    assert_within(out, exact, bound + 2 * UNIT * exact.abs())


@every_level
@many
@given(rows=rows, columns=columns, outs=outs, seed=seeds, stream=streams)
def test_fp8_rows(level: str, rows: int, columns: int, outs: int, seed: int, stream: bool) -> None:
    x = draw((rows, columns), "wide", seed)
    weight, scale = quantize_fp8_rows(draw((outs, columns), "wide", seed + 1))
    matrix = native.module().Matrix.fp8_rows(weight.view(torch.uint8), scale)
    out = kernels.linear(x, matrix, is_decode=stream, level=level)
    whole = weight.bfloat16()
    exact = x.double() @ whole.double().T * scale.double()
    bound = bf16_bound(x, whole) * scale.double()
    assert_within(out, exact, bound + 2 * UNIT * exact.abs())


every_storage = pytest.mark.parametrize(
    "matrix",
    [bf16_matrix, fp8_matrix, fp8_rows_matrix, int8_rows_matrix, int8_matrix, int4_matrix],
)


class Shape(NamedTuple):
    """A matrix of rows x columns."""

    rows: int
    columns: int


@every_level
@pytest.mark.parametrize("shape", [Shape(50, 70), Shape(272, 128)])
@every_storage
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_rows_stand_alone(
    level: str, matrix: Callable[[Tensor], object], shape: Shape, stream: bool
) -> None:
    """27 rows cross every size of a block of accumulators."""
    w = matrix(draw(shape, "normal", 1))
    x = draw((27, shape.columns), "wide", 2)
    assert_rows_stand_alone(lambda rows: kernels.linear(rows, w, is_decode=stream, level=level), x)


@every_level
@every_storage
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_tiles_without_weights_are_zero(
    level: str, matrix: Callable[..., object], stream: bool
) -> None:
    w = draw((40, 33), "normal", 1)
    w[16:32] = 0
    occupied = torch.tensor([1, 0, 1], dtype=torch.uint8)
    for count in (0, 1, 14):
        x = draw((count, 33), "normal", 2)
        whole = kernels.linear(x, matrix(w), is_decode=stream, level=level)
        skipped = kernels.linear(x, matrix(w, occupied), is_decode=stream, level=level)
        assert_same_bits(whole, skipped)


@every_level
@pytest.mark.parametrize("stream", [False, True], ids=["", "stream"])
def test_nan_and_infinity_come_out(level: str, stream: bool) -> None:
    """No row of activations with a NaN or an infinity gives a number that looks right."""
    w = draw((20, 64), "normal", 1)
    for bad in (torch.nan, torch.inf):
        x = draw((3, 64), "normal", 2)
        x[1, 40] = bad
        for matrix in (bf16_matrix(w), int8_matrix(w), int4_matrix(w)):
            out = kernels.linear(x, matrix, is_decode=stream, level=level)
            assert not out[1].isfinite().any()
            assert out[[0, 2]].isfinite().all()


def test_unfit_tensors_are_refused() -> None:
    module = native.module()
    w = torch.zeros(4, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="weight is not bfloat16"):
        module.Matrix.bf16(w.float())
    with pytest.raises(ValueError, match="rows that are not contiguous"):
        module.Matrix.bf16(w.T)
    with pytest.raises(ValueError, match="scale has 3 elements along axis 0, not 4"):
        module.Matrix.int8_rows(w.to(torch.int8), torch.ones(3))
    weight, scale, minimum = quantized.quantize_int4(w)
    with pytest.raises(ValueError, match="weight has 1 elements along axis 0, not 2"):
        module.Matrix.int4(weight, scale, minimum, rows=17, columns=8)
    with pytest.raises(ValueError, match="weight has 4 elements along axis 2, not 8"):
        module.Matrix.int8(weight, scale, rows=4, columns=8)
    matrix = module.Matrix.bf16(w)
    with pytest.raises(ValueError, match="only int8 and int4 matrices are packed"):
        module.pack(w, matrix)
    with pytest.raises(ValueError, match="weights is not float32"):
        module.pack(w.half(), int4_matrix(w))
    with pytest.raises(ValueError, match="x has 7 elements along axis 1, not 8"):
        module.linear(matrix, torch.zeros(2, 7, dtype=torch.bfloat16), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="out is not contiguous"):
        out = torch.zeros(4, 2).T
        module.linear(matrix, torch.zeros(2, 8, dtype=torch.bfloat16), out)
    with pytest.raises(ValueError, match="no level vax"):
        module.linear(matrix, w, torch.zeros(4, 4), level="vax")


def test_a_matrix_keeps_its_weights_alive() -> None:
    matrix = native.module().Matrix.bf16(torch.ones(300, 300, dtype=torch.bfloat16))
    for _ in range(50):
        torch.full((300, 300), 7.0, dtype=torch.bfloat16)
    out = kernels.linear(torch.ones(1, 300, dtype=torch.bfloat16), matrix)
    assert torch.equal(out, torch.full((1, 300), 300.0))
