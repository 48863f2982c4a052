"""Linear layer with deferred weight gradients: the backward pass computes activation gradients and
queues the rest, which zero-bubble pipeline schedules run in bubbles (arXiv 2401.10241; DeepSeek-V3
section 3.2.1). Routed experts are in `grouped`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Defer = Callable[[Callable[[], None]], None]
"""Queues a function that adds to weight gradients and is to be called once, at any later time."""


def deferred_linear(
    x: Float[Tensor, "*rows in"],
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, "out"] | None,
    defer: Defer,
) -> Float[Tensor, "*rows out"]:
    """x W^T + b in x's dtype; the gradient of the leaf `weight` goes to `defer`."""
    out = _Linear.apply(x, weight, bias, defer)
    assert isinstance(out, Tensor)
    return out


def add_gradient(weight: Float[Tensor, "*shape"], gradient: Float[Tensor, "*shape"]) -> None:
    """Accumulate the gradient of a leaf in its dtype, as a backward pass does."""
    gradient = gradient.to(weight.dtype)
    weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, defer: Defer) -> Tensor:
        ctx.save_for_backward(x)
        # Not a saved tensor: activation checkpointing replaces those by copies without gradient.
        ctx.weight, ctx.defer = weight, defer
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        weight: Tensor = ctx.weight
        if weight.requires_grad:
            ctx.defer(partial(_add_outer, weight, grad, x))
        grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
        bias_dtype = ctx.bias_dtype
        grad_bias = None if bias_dtype is None else grad.flatten(0, -2).sum(dim=0).to(bias_dtype)
        return grad_x, None, grad_bias, None


@torch.no_grad()
def _add_outer(weight: Tensor, grad: Tensor, x: Tensor) -> None:
    add_gradient(weight, grad.flatten(0, -2).T @ x.flatten(0, -2))
