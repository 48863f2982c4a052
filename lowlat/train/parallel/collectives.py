"""Collectives with gradients for tensor, expert and context parallelism.

Each is a function and its transpose (Megatron-LM's f and g, arXiv 1909.08053 section 3, among
them). For a group of None, a single process, they are the identity.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

Group = dist.ProcessGroup | None


def copy_to_group(x: Tensor, group: Group) -> Tensor:
    """Identity on x, which all processes have, with gradients all-reduced (Megatron-LM's f)."""
    if group is None:
        return x
    return applied(_Copied, x, group)


def reduce_from_group(x: Tensor, group: Group) -> Tensor:
    """All-reduced sum of x, with the gradient of the sum for each process (Megatron-LM's g)."""
    if group is None:
        return x
    return applied(_Summed, x, group)


def all_gather(
    x: Float[Tensor, "rows width"], group: dist.ProcessGroup
) -> Float[Tensor, "all_rows width"]:
    """All-gathered rows, equally many per process; gradients are reduce-scattered."""
    return applied(_Gathered, x, group)


def all_to_all(
    x: Float[Tensor, "sent width"],
    sent: Sequence[int],
    received: Sequence[int],
    group: dist.ProcessGroup,
) -> Float[Tensor, "received width"]:
    """All-to-all: sent[i] rows of x go to process i, received[i] rows come from it."""
    return applied(_Exchanged, x, list(sent), list(received), group)


def applied(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """The tensor that an autograd function gives; its `apply` has no type."""
    out = function.apply(*arguments)
    assert isinstance(out, Tensor)
    return out


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduced(grad, ctx.group), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduced(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
        dist.all_gather(list(out.chunk(group.size())), x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parts = list(grad.contiguous().chunk(ctx.group.size()))
        out = torch.empty_like(parts[0])
        dist.reduce_scatter(out, parts, group=ctx.group)
        return out, None


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _all_to_all(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def all_reduced(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The all-reduced sum of x, without a gradient."""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out


def _all_to_all(
    x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
