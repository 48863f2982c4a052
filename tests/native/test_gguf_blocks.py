"""Weights in blocks: values, GEMM and GEMV of every type, against the gguf package; types of int4
weights against `ops.int4_blocks`.
"""

import functools

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops import gguf_blocks, int4_blocks, native
from lowlat.ops.gguf_blocks import block_sizes

from . import kernels
from .inputs import (
    UNIT,
    assert_rows_stand_alone,
    assert_same_bits,
    assert_within,
    draw,
    every_pair_with_level,
    kinds,
    needs_native,
    seeds,
)

pytestmark = needs_native

TYPES = [number for number, *_ in native.module().gguf_types()] if native.available() else []
WORDS = (int4_blocks.INT4_32, int4_blocks.INT4_128)


def name_of(kind: int) -> str:
    own = {200: "INT4_BF16", 201: "INT4_32", 202: "INT4_128"}
    return own.get(kind) or GGMLQuantizationType(kind).name


every_type_and_level = every_pair_with_level("kind", TYPES, ids=name_of)
few = settings(max_examples=30)
HALVES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
"""Places of fp16 numbers in a block; 0 for types that are not listed."""


def random_blocks(kind: int, rows: int, blocks: int, seed: int) -> Tensor:
    """Rows of random bytes: NaN, infinities and the smallest scales among them."""
    generator = torch.Generator().manual_seed(seed)
    size = block_sizes(kind)[1]
    shape = (rows, blocks * size)
    return with_zero_points(
        torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), kind
    )


def with_zero_points(weights: Tensor, kind: int) -> Tensor:
    """`weights` with zero points of at most 16."""
    if kind in WORDS:
        weights[:, :: block_sizes(kind)[1]] %= int4_blocks.MAX_ZERO + 1
    return weights


def usual_blocks(kind: int, rows: int, blocks: int, seed: int) -> Tensor:
    """Random blocks whose scales are of one size: about 2^-7."""
    weights = random_blocks(kind, rows, blocks, seed)
    each = weights.view(rows, blocks, -1)
    if kind == GGMLQuantizationType.MXFP4:
        each[..., 0] = 120 + each[..., 0] % 4
    elif kind == GGMLQuantizationType.NVFP4:
        each[..., :4] = 32 + each[..., :4] % 32
    elif kind == GGMLQuantizationType.IQ1_M:
        each[..., 55] = 0x20 | each[..., 55] & 15
    elif kind == int4_blocks.INT4_BF16:
        each[..., 1] = 0x3C | each[..., 1] & 0x80
    elif kind in WORDS:
        each[..., 3] = 0x3C | each[..., 3] & 0x80
    else:
        for at in HALVES.get(name_of(kind), (0,)):
            each[..., at + 1] = 0x20 | each[..., at + 1] & 0x83
    return weights


def exact(weights: Tensor, kind: int) -> Tensor:
    if kind in int4_blocks.NAMES:
        return int4_blocks.dequantize_int4(weights, kind)
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(weights.numpy(), GGMLQuantizationType(kind)))


def assert_same_numbers(one: Tensor, other: Tensor) -> None:
    """Bit for bit; any NaN equals any other."""
    nan = other.isnan()
    assert torch.equal(one.isnan(), nan)
    assert_same_bits(one.masked_fill(nan, 0), other.masked_fill(nan, 0))


def test_the_table_is_that_of_python() -> None:
    for number, name, columns, size, _ in native.module().gguf_types():
        assert (name_of(number), block_sizes(number)) == (name, (columns, size))
        exact(torch.zeros(1, size, dtype=torch.uint8), number)


@every_type_and_level
@few
@given(seed=seeds, blocks=st.integers(1, 20))
def test_values_are_those_of_the_gguf_package(
    level: str, kind: int, seed: int, blocks: int
) -> None:
    weights = random_blocks(kind, 3, blocks, seed)
    expected = exact(weights, kind)
    found = gguf_blocks.dequantize_natively(weights, kind, level=level)
    assert_same_numbers(found, expected)


@every_type_and_level
def test_every_byte_of_every_place(level: str, kind: int) -> None:
    """Scales at their extremes: each byte of a block takes all values, the others being random."""
    weights, expected = every_byte(kind)
    found = gguf_blocks.dequantize_natively(weights, kind, level=level)
    assert_same_numbers(found, expected)


@functools.lru_cache(maxsize=1)
def every_byte(kind: int) -> tuple[Tensor, Tensor]:
    """Blocks, and their values: the same at every level."""
    size = block_sizes(kind)[1]
    weights = usual_blocks(kind, 256 * size, 1, 7)
    for at in range(size):
        weights[256 * at : 256 * (at + 1), at] = torch.arange(256, dtype=torch.uint8)
    weights = with_zero_points(weights, kind)
    return weights, exact(weights, kind)


@every_type_and_level
@few
@given(rows=st.integers(0, 20), blocks=st.integers(1, 10), kind_of_x=kinds, seed=seeds)
def test_decode_products(
    level: str, kind: int, rows: int, blocks: int, kind_of_x: str, seed: int
) -> None:
    """GEMV: within the rounding of bf16 of the product of the exact weights."""
    weights = usual_blocks(kind, 37, blocks, seed)
    w = exact(weights, kind).double()
    x = draw((rows, w.shape[1]), kind_of_x, seed + 1)
    matrix = native.module().Matrix.gguf(weights, type=kind)
    out = kernels.linear(x, matrix, is_decode=True, level=level)
    # An activation's step is 1/16256 of the largest of its 32.
    groups = x.double().abs().unflatten(1, (-1, 32))
    off = groups.amax(dim=2, keepdim=True).expand_as(groups).flatten(1) / 32512 * 1.001
    # Codes of the integer products are at most 255 steps from 0, however small the weight.
    size = w.abs() + 256 * steps_of(w)
    bound = off @ w.abs().T + (w.shape[1] / 16 + 40) * UNIT * (x.double().abs() @ size.T)
    assert_within(out, x.double() @ w.T, bound + w.shape[1] * 2.0**-120)


def steps_of(w: Tensor) -> Tensor:
    """An upper bound of the scale of each 16 weights: their largest magnitude."""
    groups = w.abs().unflatten(1, (-1, 32))
    return groups.amax(dim=2, keepdim=True).expand_as(groups).flatten(1)


@every_type_and_level
@few
@given(rows=st.integers(0, 40), blocks=st.integers(1, 6), seed=seeds)
def test_prefill_products_are_those_of_bf16_weights(
    level: str, kind: int, rows: int, blocks: int, seed: int
) -> None:
    """GEMM: the bits of a bf16 matrix of the values."""
    weights = usual_blocks(kind, 37, blocks, seed)
    dense = exact(weights, kind).bfloat16()
    x = draw((rows, dense.shape[1]), "normal", seed + 1)
    packed = native.module().Matrix.gguf(weights, type=kind)
    plain = native.module().Matrix.bf16(dense)
    out = kernels.linear(x, packed, level=level)
    assert_same_bits(out, kernels.linear(x, plain, level=level))


@every_type_and_level
@pytest.mark.parametrize("decode", [False, True], ids=["", "decode"])
def test_rows_stand_alone(level: str, kind: int, decode: bool) -> None:
    """27 rows cross every size of a block of accumulators."""
    weights = usual_blocks(kind, 50, 256 * 9 // block_sizes(kind)[0] // 4, 3)
    matrix = native.module().Matrix.gguf(weights, type=kind)
    x = draw((27, matrix.columns), "wide", 2)
    assert_rows_stand_alone(
        lambda rows: kernels.linear(rows, matrix, is_decode=decode, level=level), x
    )


@every_type_and_level
def test_nan_and_infinity_come_out(level: str, kind: int) -> None:
    weights = usual_blocks(kind, 20, 8, 1)
    matrix = native.module().Matrix.gguf(weights, type=kind)
    for bad in (torch.nan, torch.inf):
        x = draw((3, matrix.columns), "normal", 2)
        x[1, 40] = bad
        out = kernels.linear(x, matrix, is_decode=True, level=level)
        assert not out[1].isfinite().any()
        assert out[[0, 2]].isfinite().all()


@pytest.mark.parametrize("level", native.levels())
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("decode", [False, True])
def test_largest_scales_of_mxfp4(level: str, interleaved: bool, decode: bool) -> None:
    """Finite where weights and products are: scale bytes 253 and 254 are numbers, and 255 is the
    one that the gguf package makes of it.
    """
    kind = int(GGMLQuantizationType.MXFP4)
    weights = random_blocks(kind, 37, 9, 3).view(37, 9, -1)
    weights[..., 0] = 252 + weights[..., 0] % 4
    weights[..., 1:] &= 0x99  # 0, 0.5 and their negatives: finite weights at every scale
    weights = weights.flatten(1)
    w = exact(weights, kind)
    assert w.isfinite().all() and w.abs().max() == 2.0**127
    x = (draw((3, w.shape[1]), "normal", 4).float() * 2.0**-40).bfloat16()
    packed = gguf_blocks.interleave(weights, kind) if interleaved else weights
    rows = {"interleaved_rows": 37} if interleaved else {}
    assert_same_numbers(gguf_blocks.dequantize_natively(packed, kind, level=level, **rows), w)
    matrix = native.module().Matrix.gguf(packed, type=kind, **rows)
    out = kernels.linear(x, matrix, is_decode=decode, level=level)
    size = x.double().abs() @ w.double().abs().T
    assert_within(out, x.double() @ w.double().T, size * 2.0**-7)


INTERLEAVED = (
    [number for number, *_, can in native.module().gguf_types() if can]
    if native.available()
    else []
)
every_interleaved_and_level = every_pair_with_level("kind", INTERLEAVED, ids=name_of)


@every_interleaved_and_level
@few
@given(rows=st.integers(0, 30), blocks=st.integers(1, 9), seed=seeds)
def test_interleaved_rows(level: str, kind: int, rows: int, blocks: int, seed: int) -> None:
    """The same values, the same bits of prefill, and decode products as near as those of rows."""
    weights = usual_blocks(kind, 37, blocks, seed)
    packed = gguf_blocks.interleave(weights, kind)
    found = gguf_blocks.dequantize_natively(packed, kind, interleaved_rows=37, level=level)
    w = exact(weights, kind)
    assert_same_numbers(found, w)
    plain = native.module().Matrix.gguf(weights, type=kind)
    matrix = native.module().Matrix.gguf(packed, type=kind, interleaved_rows=37)
    x = draw((rows, w.shape[1]), "normal", seed + 1)
    assert_same_bits(kernels.linear(x, matrix, level=level), kernels.linear(x, plain, level=level))
    out = kernels.linear(x, matrix, is_decode=True, level=level)
    other = kernels.linear(x, plain, is_decode=True, level=level)
    size = x.double().abs() @ (w.double().abs() + 256 * steps_of(w.double())).T
    assert_within(out, other.double(), (w.shape[1] / 8 + 80) * UNIT * size)


@every_interleaved_and_level
@pytest.mark.parametrize("decode", [False, True], ids=["", "decode"])
def test_interleaved_rows_stand_alone(level: str, kind: int, decode: bool) -> None:
    packed = gguf_blocks.interleave(usual_blocks(kind, 50, 9, 3), kind)
    matrix = native.module().Matrix.gguf(packed, type=kind, interleaved_rows=50)
    x = draw((27, matrix.columns), "wide", 2)
    assert_rows_stand_alone(
        lambda rows: kernels.linear(rows, matrix, is_decode=decode, level=level), x
    )


def test_unfit_blocks_are_refused() -> None:
    module = native.module()
    with pytest.raises(ValueError, match="no GGUF type 0"):
        module.Matrix.gguf(torch.zeros(2, 18, dtype=torch.uint8), type=0)
    with pytest.raises(ValueError, match="rows that are not whole blocks"):
        module.Matrix.gguf(torch.zeros(2, 17, dtype=torch.uint8), type=2)
    matrix = module.Matrix.bf16(torch.zeros(2, 2, dtype=torch.bfloat16))
    packed = torch.zeros(17, 18, dtype=torch.uint8)
    with pytest.raises(ValueError, match="weight is not interleaved rows"):
        module.Matrix.gguf(packed, type=2, interleaved_rows=17)
    with pytest.raises(ValueError, match="only matrices in GGUF blocks"):
        module.dequantize(matrix, torch.zeros(2, 2))


def test_bf16_values_are_rounded_once() -> None:
    weights = usual_blocks(GGMLQuantizationType.Q6_K, 5, 2, 0)
    wide = gguf_blocks.dequantize_natively(weights, int(GGMLQuantizationType.Q6_K))
    narrow = gguf_blocks.dequantize_natively(
        weights, int(GGMLQuantizationType.Q6_K), dtype=torch.bfloat16
    )
    assert_same_bits(narrow, wide.bfloat16())
