"""RMSNorm, RoPE and SwiGLU at every level, against the exact result rounded once to bf16; KV cache
entries, bit by bit.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.attention.int8_entry import pack_entries
from lowlat.ops import experts, norm, rope

from . import kernels
from .inputs import (
    BF16_UNIT,
    UNIT,
    assert_rows_stand_alone,
    assert_same_bits,
    assert_within,
    draw,
    every_level,
    kinds,
    needs_native,
    seeds,
)

pytestmark = needs_native

many = settings(max_examples=60, deadline=None)
rows = st.integers(0, 9)
sizes = st.integers(1, 130)
SMALLEST = 2.0**-133
"""The smallest bf16 number: below 2^-126 numbers are that far apart."""


@every_level
@many
@given(rows=rows, size=sizes, kind=kinds, seed=seeds, eps=st.sampled_from([1e-6, 1e-5, 0.5]))
def test_rms_norm(level: str, rows: int, size: int, kind: str, seed: int, eps: float) -> None:
    """Squares beyond fp32 are infinite in the definition too, and the result is 0."""
    x, weight = draw((rows, size), kind, seed), torch.randn(size)
    out = kernels.rms_norm(x, weight, eps, level=level)
    exact = norm.rms_norm(x.float() if kind == "huge" else x.double(), weight.double(), eps)
    assert_within(out, exact, BF16_UNIT * exact.abs() + (size + 8) * UNIT * exact.abs() + SMALLEST)


@every_level
def test_rms_norm_of_any_leading_axes(level: str) -> None:
    x = draw((2, 3, 20), "normal", 1)
    out = kernels.rms_norm(x, torch.ones(20), 1e-6, level=level)
    assert torch.equal(
        out.flatten(0, 1),
        kernels.rms_norm(x.flatten(0, 1), torch.ones(20), 1e-6, level=level),
    )


@every_level
@many
@given(
    tokens=st.integers(0, 5),
    heads=st.integers(1, 4),
    pairs=st.integers(1, 40),
    kind=kinds,
    seed=seeds,
    interleave=st.booleans(),
)
def test_rotation(
    level: str, tokens: int, heads: int, pairs: int, kind: str, seed: int, interleave: bool
) -> None:
    x = draw((tokens, heads, 2 * pairs), kind, seed)
    angles = 100 * torch.rand(tokens, pairs)
    cos, sin = angles.cos(), angles.sin()
    out = kernels.apply_rope(x, rope.RotaryTable(cos, sin), interleave=interleave, level=level)
    exact = rope.apply_rope(
        x.double(), rope.RotaryTable(cos.double(), sin.double()), interleave=interleave
    )
    terms = (
        rope.apply_rope(
            x.double().abs(),
            rope.RotaryTable(cos.double().abs(), -sin.double().abs()),
            interleave=interleave,
        ).abs()
        + x.double().abs()
    )
    assert_within(out, exact, BF16_UNIT * exact.abs() + 4 * UNIT * terms + SMALLEST)


@every_level
@many
@given(rows=rows, size=sizes, kind=kinds, seed=seeds)
def test_swiglu(level: str, rows: int, size: int, kind: str, seed: int) -> None:
    gate, up = draw((rows, size), kind, seed), draw((rows, size), "normal", seed + 1)
    out = kernels.swiglu(gate, up, level=level)
    exact = experts.swiglu(gate.double(), up.double())
    # e^-87 and less count as 0
    vanished = 1e-36 * up.double().abs()
    assert_within(out, exact, (BF16_UNIT + 8 * UNIT) * exact.abs() + vanished + SMALLEST)


@every_level
def test_swiglu_at_the_ends_of_bf16(level: str) -> None:
    largest = torch.finfo(torch.bfloat16).max
    gate = torch.tensor([[-largest, -1e30, -200.0, 0.0, 200.0, 1e30, torch.nan]]).bfloat16()
    out = kernels.swiglu(gate, torch.ones_like(gate), level=level)[0]
    assert torch.equal(out[:4], torch.zeros(4, dtype=torch.bfloat16))
    assert torch.equal(out[4:6], gate[0, 4:6])
    assert out[6].isnan()


@every_level
def test_rows_stand_alone(level: str) -> None:
    weight, up = torch.randn(77), draw((1, 77), "normal", 3)
    x = draw((15, 77), "wide", 1)
    assert_rows_stand_alone(lambda x: kernels.rms_norm(x, weight, 1e-6, level=level), x)
    assert_rows_stand_alone(lambda x: kernels.swiglu(x, up.expand_as(x), level=level), x)


@every_level
def test_rotation_leaves_its_input(level: str) -> None:
    x = draw((3, 2, 8), "normal", 1)
    before = x.clone()
    table = rope.RotaryTable(torch.rand(3, 4), torch.rand(3, 4))
    kernels.apply_rope(x, table, interleave=True, level=level)
    assert torch.equal(x, before)


@every_level
@many
@given(rows=st.integers(1, 9), quantized=sizes, rest=st.integers(0, 9), kind=kinds, seed=seeds)
def test_cache_entries_have_the_bits_of_their_definition(
    level: str, rows: int, quantized: int, rest: int, kind: str, seed: int
) -> None:
    x = draw((rows, quantized + rest), kind, seed)
    assert_same_bits(kernels.pack_entries(x, quantized, level=level), pack_entries(x, quantized))


@every_level
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("quantized", [1, 11, 16, 40, 64, 72, 130])
def test_one_number_that_is_not_finite_spoils_its_group(
    level: str, value: float, quantized: int
) -> None:
    """Regression: a maximum that loses NaN, so that a NaN entry is cached as zeros."""
    x = draw((quantized + 2, quantized + 3), "normal", 1)
    x[:quantized].diagonal().fill_(value)
    x[-1] = value  # and one row of nothing else
    packed = kernels.pack_entries(x, quantized, level=level)
    assert_same_bits(packed, pack_entries(x, quantized))
    groups = -(-quantized // 64)
    at = -(-quantized // 4) * 4
    scales = packed[:, at : at + 4 * groups].contiguous().view(torch.float32)
    expected = torch.ones(quantized + 2, groups, dtype=torch.bool)
    expected[torch.arange(quantized), torch.arange(quantized) // 64] = False
    expected[-1] = False
    assert torch.equal(scales.isfinite(), expected)
