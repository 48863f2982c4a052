"""RMSNorm against numbers worked out by hand."""

import pytest
import torch

from lowlat.ops.norm import accumulation_dtype, rms_norm


def test_hand_computed() -> None:
    # mean square of (3, 4) is 12.5; 3 / sqrt(12.5) = 0.848528, 4 / sqrt(12.5) = 1.131371
    out = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, -2.0]), 0.0)
    torch.testing.assert_close(out, torch.tensor([[0.8485281, -2.2627417]]))


def test_epsilon_is_added_to_the_mean_square() -> None:
    # 1e-3 / sqrt(1e-6 + 3e-6) = 0.5
    out = rms_norm(torch.full((1, 5), 1e-3), torch.ones(5), 3e-6)
    torch.testing.assert_close(out, torch.full((1, 5), 0.5))
    assert torch.equal(rms_norm(torch.zeros(2, 3), torch.ones(3), 1e-6), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(dtype: torch.dtype) -> None:
    """Regression: rounding the normalised value before the weight, or squaring in the narrow
    type.
    """
    x, weight = (torch.randn(67, 13) * 7).to(dtype), torch.randn(13).to(dtype)
    exact = (
        x.double()
        * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
        * weight.double()
    )
    out = rms_norm(x, weight, 1e-6)
    assert out.dtype == dtype
    # A second rounding would move about a third of the values by one unit.
    moved = (out != exact.to(dtype)).float().mean()
    assert moved < 0.01


def test_accumulates_wide() -> None:
    assert accumulation_dtype(torch.bfloat16) == torch.float32
    assert accumulation_dtype(torch.float32) == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64
    assert rms_norm(torch.randn(3, 5).double(), torch.randn(5), 1e-6).dtype == torch.float64
