"""FP8 products of tensor cores against their definition. Needs a Hopper GPU and CUDA 12.9."""

import pytest
import torch

from lowlat.ops import fp8_scaled_mm
from lowlat.ops.fp8_training import (
    ALONG_COLUMNS,
    ALONG_ROWS,
    SQUARE,
    Fp8Format,
    blockwise_product,
    fp8_linear,
    product,
    quantize,
)

pytestmark = pytest.mark.gpu

SHAPES = [(131, 257, 139), (1, 3, 5), (256, 4096, 384)]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if not torch.cuda.is_available() or not fp8_scaled_mm.is_available(torch.device("cuda")):
        pytest.skip("needs a GPU that multiplies fp8 blocks")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_the_definition(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Tensor cores add with about 14 bits within 128 columns: 2^-12 of the terms' magnitudes."""
    rows, width, out = shape
    a = quantize(torch.randn(rows, width, device="cuda"), ALONG_ROWS)
    b = quantize(torch.randn(out, width, device="cuda"), SQUARE)
    wide = a.dense(torch.float64), b.dense(torch.float64).T
    bound = wide[0].abs() @ wide[1].abs() * (2.0**-12 + (2.0**-8 if dtype != torch.float32 else 0))
    assert ((product(a, b, dtype).double() - wide[0] @ wide[1]).abs() <= bound).all()
    assert ((blockwise_product(a, b).double() - wide[0] @ wide[1]).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_along_the_tokens(shape: tuple[int, int, int]) -> None:
    """wgrad: both operands transposed, both in tiles."""
    rows, width, out = shape
    grad = quantize(torch.randn(rows, out, device="cuda"), ALONG_COLUMNS).transposed
    x = quantize(torch.randn(rows, width, device="cuda"), ALONG_COLUMNS).transposed
    wide = grad.dense(torch.float64), x.dense(torch.float64).T
    bound = wide[0].abs() @ wide[1].abs() * 2.0**-12
    assert ((product(grad, x, torch.float32).double() - wide[0] @ wide[1]).abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_is_that_of_the_cpu(shape: tuple[int, int, int]) -> None:
    rows, width, out = shape
    results = []
    x, weight = torch.randn(rows, width).bfloat16(), torch.randn(out, width)
    grad = torch.randn(rows, out).bfloat16()
    for device in ("cpu", "cuda"):
        own = [tensor.to(device).requires_grad_() for tensor in (x, weight)]
        y = fp8_linear(own[0], own[1], None, Fp8Format())
        y.backward(grad.to(device))
        results.append([tensor.float().cpu() for tensor in (y, own[0].grad, own[1].grad)])  # pyright: ignore[reportOptionalMemberAccess]
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert (on_cpu - on_gpu).norm() <= 4e-3 * on_cpu.norm()
