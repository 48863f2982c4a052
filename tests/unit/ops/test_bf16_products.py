"""bf16 products in fp32, as on CPUs without bf16 GEMM: rounded once, with gradients."""

import pytest
import torch

from lowlat.ops import bf16_products


@pytest.fixture(autouse=True)
def _without_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bf16_products, "has_bf16_gemm", lambda: False)


def test_result_and_gradients_are_rounded_once() -> None:
    """Small integers have exact sums in fp32, which bf16 rounds."""
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randint(-30, 30, shape, generator=generator).bfloat16()
        for shape in ((5, 131), (7, 131), (5, 7))
    )
    x.requires_grad_()
    weight.requires_grad_()
    out = bf16_products.linear(x, weight)
    out.backward(grad)
    given, matrix, wide = x.detach().double(), weight.detach().double(), grad.double()
    assert torch.equal(out, (given @ matrix.T).bfloat16())
    assert x.grad is not None and torch.equal(x.grad, (wide @ matrix).bfloat16())
    assert weight.grad is not None and torch.equal(weight.grad, (wide.T @ given).bfloat16())


def test_product_without_rows_is_zero() -> None:
    left, right = torch.empty(3, 0).bfloat16(), torch.empty(0, 5).bfloat16()
    out = torch.ones(3, 5).bfloat16()
    bf16_products.product(left, right, out)
    assert not out.any()
