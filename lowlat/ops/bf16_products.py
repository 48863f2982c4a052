"""bf16 matrix products with gradients, in fp32 on CPUs without bf16 GEMM, where PyTorch multiplies
bf16 at up to 60 times the time of fp32. Either way sums are fp32 and rounded once.
"""

from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@cache
def has_bf16_gemm() -> bool:
    """Whether oneDNN has bf16 GEMM on this CPU."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(
    left: Float[Tensor, "rows inner"],
    right: Float[Tensor, "inner columns"],
    out: Float[Tensor, "rows columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """left right, in their dtype; written to `out` if it is given."""
    if left.dtype != torch.bfloat16 or left.device.type != "cpu" or has_bf16_gemm():
        return torch.mm(left, right, out=out)
    wide = left.float() @ right.float()
    return wide.to(left.dtype) if out is None else out.copy_(wide)


def linear(
    x: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"]
) -> Float[Tensor, "rows out"]:
    """x W^T, differentiable, all by `product`."""
    out = _Linear.apply(x, weight)
    assert isinstance(out, Tensor)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.T)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = product(grad, weight) if needs_x else None
        return grad_x, product(grad.T, x) if needs_weight else None
