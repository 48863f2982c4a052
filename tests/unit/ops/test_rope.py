"""Rotary embedding: frequencies, YaRN's two corrections, both layouts, against numbers worked out
by hand.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from lowlat.config.model import ModelConfig, RopeConfig, yarn_mscale
from lowlat.ops import native_training_kernels
from lowlat.ops.rope import (
    RotaryEmbedding,
    RotaryTable,
    apply_rope,
    inverse_frequencies,
    rotation_magnitude,
)
from tests.configs import GQA, LLAMA3, V3_MLA, YARN, model_config

V3_ROPE = replace(
    YARN, factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
)
V2_LITE_ROPE = replace(V3_ROPE, mscale=0.707, mscale_all_dim=0.707)


def yarn(mscale: float | None, mscale_all_dim: float | None, **changes: float) -> RopeConfig:
    scales: dict[str, Any] = {"mscale": mscale, "mscale_all_dim": mscale_all_dim}
    return replace(V3_ROPE, rope_interleave=False, **(scales | changes))


def mla_model(rope: RopeConfig) -> ModelConfig:
    return model_config("deepseek_v3", V3_MLA, rope=rope)


@pytest.mark.parametrize(("rope", "factor"), [(V3_ROPE, 1.874), (V2_LITE_ROPE, 1.590)])
def test_yarn_softmax_factor_of_released_models(rope: RopeConfig, factor: float) -> None:
    """Regression: YaRN's correction of the softmax scale left out, or applied once instead of
    squared.
    """
    assert mla_model(rope).softmax_scale_of(0) * math.sqrt(192) == pytest.approx(factor, abs=5e-4)


def test_yarn_softmax_factor_only_with_yarn() -> None:
    assert mla_model(RopeConfig(rope_theta=1e4)).softmax_scale_of(0) == pytest.approx(192**-0.5)
    # mscale alone belongs to cos and sin
    assert mla_model(yarn(1.0, None)).softmax_scale_of(0) == pytest.approx(192**-0.5)
    gqa = model_config("deepseek_v3", replace(GQA, head_dim=16), rope=V3_ROPE)
    assert gqa.softmax_scale_of(0) == pytest.approx(0.25)


def test_yarn_cos_and_sin_factor() -> None:
    """Regression: the factor on cos and sin left out, inverted, or m(mscale) alone."""
    # m(1) = 0.1 ln 40 + 1 = 1.3688879, m(0.707) = 1.2608038
    assert rotation_magnitude(V3_ROPE) == 1.0
    assert rotation_magnitude(V2_LITE_ROPE) == 1.0
    assert rotation_magnitude(yarn(1.0, 0.707)) == pytest.approx(1.3688879 / 1.2608038, rel=1e-6)
    assert rotation_magnitude(yarn(0.707, 1.0)) == pytest.approx(1.2608038 / 1.3688879, rel=1e-6)
    assert rotation_magnitude(yarn(None, None)) == pytest.approx(1.3688879, rel=1e-6)
    assert rotation_magnitude(yarn(1.0, 0.707, attention_factor=1.25)) == 1.25
    assert rotation_magnitude(RopeConfig(rope_theta=1e4)) == 1.0


def test_the_tables_carry_the_factor() -> None:
    """Position 0 cannot show an error in the frequencies, but it does show the magnitude: cos(0)
    is the factor.
    """
    cos, sin = RotaryEmbedding(yarn(1.0, 0.707), 6)(torch.tensor([0, 7001]))
    factor = 1.3688879 / 1.2608038
    torch.testing.assert_close(cos[0], torch.full((3,), factor))
    assert torch.equal(sin[0], torch.zeros(3))
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((2, 3), factor**2))


def test_yarn_mscale_is_one_without_extension() -> None:
    assert yarn_mscale(1.0, 1.0) == 1.0
    assert yarn_mscale(0.5, 1.0) == 1.0
    assert yarn_mscale(math.e, 2.0) == pytest.approx(1.2)


def test_default_frequencies() -> None:
    inverse = inverse_frequencies(RopeConfig(rope_theta=10000.0), 8)
    torch.testing.assert_close(inverse, torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_linear_frequencies() -> None:
    inverse = inverse_frequencies(RopeConfig(rope_theta=100.0, rope_type="linear", factor=4.0), 4)
    torch.testing.assert_close(inverse, torch.tensor([0.25, 0.025]))


def test_longrope_frequencies() -> None:
    rope = RopeConfig(rope_theta=100.0, rope_type="longrope", pair_factors=(2.0, 0.5))
    torch.testing.assert_close(inverse_frequencies(rope, 4), torch.tensor([0.5, 0.2]))


def test_yarn_ramp_of_deepseek_v3() -> None:
    """The ramp runs from pair 10 to pair 23: 64 ln(4096 / (32 tau)) / (2 ln 1e4) = 10.47, with 1:
    22.51.
    """
    inverse = inverse_frequencies(V3_ROPE, 64).double()
    base = 10000.0 ** (-torch.arange(32).double() / 32)
    torch.testing.assert_close(inverse[:11], base[:11], rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse[23:], base[23:] / 40, rtol=1e-6, atol=0)
    for pair in (11, 16, 22):
        interpolated = (pair - 10) / 13
        expected = base[pair] * (1 - interpolated) + base[pair] / 40 * interpolated
        assert inverse[pair].item() == pytest.approx(expected.item(), rel=1e-6)


def test_yarn_with_equal_betas_is_a_step() -> None:
    """Kimi-K2's beta_fast = beta_slow = 1: a ramp of one pair, and no division by zero."""
    rope = yarn(1.0, 1.0, beta_fast=1.0, beta_slow=1.0)
    inverse = inverse_frequencies(rope, 64)
    base = inverse_frequencies(RopeConfig(rope_theta=10000.0), 64)
    torch.testing.assert_close(inverse[:23], base[:23])
    torch.testing.assert_close(inverse[23:], base[23:] / 40)


def test_yarn_without_truncation_keeps_fractional_borders() -> None:
    rope = yarn(1.0, 1.0, truncate=False)
    low = 64 * math.log(4096 / (32 * math.tau)) / (2 * math.log(1e4))
    high = 64 * math.log(4096 / math.tau) / (2 * math.log(1e4))
    interpolated = (16 - low) / (high - low)
    expected = 0.01 * (1 - interpolated) + 0.01 / 40 * interpolated
    assert inverse_frequencies(rope, 64)[16].item() == pytest.approx(expected, rel=1e-6)


def test_llama3_frequencies() -> None:
    """Wavelengths tau * 10^i against borders 100 / 4 = 25 and 100 / 1 = 100."""
    rope = replace(LLAMA3, original_max_position_embeddings=100)
    smooth = (100 / (math.tau * 10) - 1) / (4 - 1)
    blended = 0.1 * ((1 - smooth) / 8 + smooth)
    expected = torch.tensor([1.0, blended, 0.01 / 8, 0.001 / 8])
    torch.testing.assert_close(inverse_frequencies(rope, 8), expected)


def quarter_and_half_turn() -> RotaryTable:
    """cos and sin of 90 degrees for pair 0 and of 180 degrees for pair 1."""
    return RotaryTable(torch.tensor([[0.0, -1.0]]), torch.tensor([[1.0, 0.0]]))


BOTH_FORMS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
"""The native kernels do not know fp64."""


@BOTH_FORMS
def test_interleaved_pairs_are_neighbours(dtype: torch.dtype) -> None:
    """Regression: the half-split layout on interleaved weights."""
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=dtype)
    out = apply_rope(x, quarter_and_half_turn(), interleave=True)
    assert out.tolist() == [[[-2.0, 1.0, -3.0, -4.0]]]


@BOTH_FORMS
def test_half_split_pairs_are_half_a_head_apart(dtype: torch.dtype) -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], dtype=dtype)
    out = apply_rope(x, quarter_and_half_turn(), interleave=False)
    assert out.tolist() == [[[-3.0, -2.0, 1.0, -4.0]]]


@pytest.mark.parametrize("interleave", [True, False])
def test_scores_depend_on_distance_only(interleave: bool) -> None:
    tables = RotaryEmbedding(RopeConfig(rope_theta=100.0), 6)
    q, k = torch.randn(1, 3, 6).double(), torch.randn(1, 3, 6).double()

    def scores(query: int, key: int) -> torch.Tensor:
        rotated_q = apply_rope(q, tables(torch.tensor([query])), interleave=interleave)
        rotated_k = apply_rope(k, tables(torch.tensor([key])), interleave=interleave)
        return (rotated_q * rotated_k).sum(-1)

    torch.testing.assert_close(scores(1029, 1018), scores(11, 0), rtol=1e-4, atol=1e-4)
    assert (scores(11, 0) - scores(12, 0)).abs().max() > 1e-2


def test_rotates_in_fp32_and_rounds_once() -> None:
    x = torch.randn(31, 3, 10).to(torch.bfloat16)
    tables = RotaryEmbedding(RopeConfig(rope_theta=1e4), 10)(torch.arange(60000, 60031))
    out = apply_rope(x, tables, interleave=True)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, apply_rope(x.float(), tables, interleave=True).to(torch.bfloat16))


def test_tables_are_fp32_at_far_positions() -> None:
    """Regression: positions cast to a narrow type; at 60,001 fp16 is infinite and bf16 off by
    191.
    """
    cos, sin = RotaryEmbedding(RopeConfig(rope_theta=1e4), 4)(torch.tensor([60001]))
    assert cos.dtype == torch.float32
    expected = torch.tensor([60001.0, 600.01], dtype=torch.float64)
    torch.testing.assert_close(cos[0].double(), expected.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin[0].double(), expected.sin(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_native_rotation(dtype: torch.dtype, interleave: bool) -> None:
    """Those of the plain form, of a slice of something wider as MLA rotates it."""
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(11, 3, 26, generator=generator).to(dtype).requires_grad_()
    table = RotaryEmbedding(V3_ROPE, 20)(torch.arange(11))
    grad = torch.randn(11, 3, 20, generator=generator).to(dtype)
    found = []
    for is_usable in (native_training_kernels.usable, lambda *tensors: False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_training_kernels, "usable", is_usable)
            rotated = apply_rope(leaf[..., 6:], table, interleave=interleave)
            found.append((rotated.detach(), *torch.autograd.grad(rotated, leaf, grad)))
    assert torch.equal(found[0][0], found[1][0])
    close = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found[0][1], found[1][1], rtol=close, atol=close)
