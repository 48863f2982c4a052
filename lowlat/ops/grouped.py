"""Grouped GEMM of stacked experts with gradients: the training version of `experts.routed_experts`.

Dropless: every token reaches all its experts, without a capacity factor. Rows are sorted by expert,
one product per expert and projection; the backward pass saves neither
the gathered rows nor the activations.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.ops import native_training_kernels
from lowlat.ops.autograd import gated_backward
from lowlat.ops.bf16_products import has_bf16_gemm, product
from lowlat.ops.deferred import Defer, add_gradient
from lowlat.ops.experts import swiglu
from lowlat.ops.norm import accumulation_dtype
from lowlat.ops.routing import Routing

ROW_UNIT = 64
"""Rows of an expert are padded to a multiple of this for oneDNN's bf16 products: oneDNN compiles a
kernel for every new number of rows, which takes longer than the product.
"""


class Groups(NamedTuple):
    """Token-to-expert assignments of a batch, sorted by expert; each expert's rows are padded with
    rows of token 0 and weight 0.
    """

    order: Int[Tensor, "choices"]
    """Indices into the flattened [tokens, chosen] choice, sorted by expert and then by token."""
    rows: Int[Tensor, "choices"]
    """Row of each assignment."""
    tokens: Int[Tensor, "rows"]
    """Token of each row."""
    counts: list[int]
    """Rows of each expert."""


def group_by_expert(
    experts: Int[Tensor, "tokens chosen"], num_experts: int, *, unit: int = 1
) -> Groups:
    """Sort assignments by expert, stably by token, and pad the rows of every expert to a multiple
    of `unit`.
    """
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    chosen = torch.bincount(flat, minlength=num_experts)
    counts = (chosen + unit - 1) // unit * unit
    # Padding rows before an expert's first row.
    shift = (counts - chosen).cumsum(0) - (counts - chosen)
    rows = torch.arange(len(order), device=order.device) + shift[flat[order]]
    sizes = counts.tolist()
    tokens = order.new_zeros(sum(sizes))
    tokens[rows] = order // experts.shape[1]
    return Groups(order, rows, tokens, sizes)


def grouped_linear(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "experts out in"],
    counts: Sequence[int],
    *,
    is_transposed: bool = False,
) -> Float[Tensor, "rows outputs"]:
    """Grouped GEMM: every expert's product with its own rows, x W^T, or with `is_transposed` x W.
    Weights of another dtype are rounded to x's.
    """
    if native_training_kernels.multiplies_groups(x, weight):
        return native_training_kernels.grouped(
            x, weight, torch.tensor(counts), is_transposed=is_transposed
        )
    weight = weight.to(x.dtype)
    weight = weight if is_transposed else weight.transpose(1, 2)
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight, offs=_ends(counts, x))
    out = x.new_empty(x.shape[0], weight.shape[2])
    for rows, group, matrix in zip(x.split(counts), out.split(counts), weight, strict=True):
        product(rows, matrix, out=group)
    return out


def grouped_outer(
    left: Float[Tensor, "rows out"],
    right: Float[Tensor, "rows in"],
    counts: Sequence[int],
    dtype: torch.dtype,
) -> Float[Tensor, "experts out in"]:
    """left^T right over the rows of each expert in `dtype`: the gradient of its weight. Zero
    without rows.
    """
    if native_training_kernels.multiplies_groups(left, right):
        return native_training_kernels.outer(left, right, torch.tensor(counts)).to(dtype)
    if left.is_cuda and left.dtype == torch.bfloat16:
        return F.grouped_mm(left.T, right, offs=_ends(counts, left)).to(dtype)
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])
    groups = zip(left.split(counts), right.split(counts), out, strict=True)
    for rows, columns, matrix in groups:
        product(rows.T, columns, out=matrix)
    return out.to(dtype)


def _ends(counts: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(counts, device=like.device).cumsum(0).to(torch.int32)


def stacked_experts(
    x: Float[Tensor, "tokens hidden"],
    routing: Routing,
    gate_up_proj: Float[Tensor, "experts inner_twice hidden"],
    down_proj: Float[Tensor, "experts hidden inner"],
    defer: Defer | None = None,
) -> Float[Tensor, "tokens hidden"]:
    """Weighted sum over the chosen experts (DeepSeek-V3 equations 12 and 13), differentiable in
    everything but the choice.

    gate_up_proj holds each expert's gate rows, then its up rows. Weights of another dtype are cast
    to x's; their gradients have the weights' own dtype and go to `defer` if it is given (weights
    are leaves then). Sums over experts are fp32 (fp64 for fp64 inputs).
    """
    by_onednn = x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_bf16_gemm()
    if native_training_kernels.multiplies_groups(x, gate_up_proj, down_proj):
        by_onednn = False
    unit = ROW_UNIT if by_onednn else 1
    groups = group_by_expert(routing.experts, gate_up_proj.shape[0], unit=unit)
    out = _StackedExperts.apply(x, routing.weights, gate_up_proj, down_proj, groups, defer)
    assert isinstance(out, Tensor)
    return out


class _StackedExperts(torch.autograd.Function):
    """Saves the gate and up products, the choice, and x if experts are trained; backward gathers
    the rows again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        groups: Groups,
        defer: Defer | None,
    ) -> Tensor:
        factors = _factors(weights, groups, accumulation_dtype(x.dtype))
        rows = x.index_select(0, groups.tokens)
        gate_up = grouped_linear(rows, gate_up_proj, groups.counts)
        inner = _swiglu(gate_up)
        rows = grouped_linear(inner, down_proj, groups.counts)
        # x is needed for the experts' weight gradients only.
        given = x if any(ctx.needs_input_grad[2:4]) else None
        ctx.save_for_backward(given, weights, gate_up_proj, down_proj, gate_up)
        ctx.groups = groups
        ctx.defer = defer
        # Saved tensors may be restored as copies, which do not accumulate gradients.
        ctx.leaves = None if defer is None else (gate_up_proj, down_proj)
        return _combine(rows, factors, groups, weights.shape[1])

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, None, None]:
        x, weights, gate_up_proj, down_proj, gate_up = ctx.saved_tensors
        groups: Groups = ctx.groups
        factors = _factors(weights, groups, accumulation_dtype(gate_up.dtype))
        grads = grad.to(gate_up.dtype).index_select(0, groups.tokens)
        grad_inner = grouped_linear(grads, down_proj, groups.counts, is_transposed=True)
        inner, grad_gate_up, row_factors = gated_backward(gate_up, grad_inner, factors)
        assert row_factors is not None
        grad_factors = torch.empty_like(weights).flatten()
        grad_factors[groups.order] = row_factors[groups.rows].to(weights.dtype)
        grad_rows = grouped_linear(grad_gate_up, gate_up_proj, groups.counts, is_transposed=True)
        grad_x = _combine(grad_rows, None, groups, weights.shape[1])
        grad_weights = grad_factors.view_as(weights)
        if not any(ctx.needs_input_grad[2:4]):
            return grad_x, grad_weights, None, None, None, None
        given = x, grads, factors, inner, grad_gate_up, groups
        outer = partial(_outer, *given, gate_up_proj.dtype)
        if ctx.defer is not None:
            ctx.defer(partial(_add_outer, ctx.leaves, outer))
            return grad_x, grad_weights, None, None, None, None
        return grad_x, grad_weights, *outer(), None, None


def _outer(
    x: Tensor,
    grads: Tensor,
    factors: Tensor,
    inner: Tensor,
    grad_gate_up: Tensor,
    groups: Groups,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of gate_up_proj and down_proj, in `dtype`."""
    scaled = (grads * factors[:, None]).to(grads.dtype)
    down = grouped_outer(scaled, inner, groups.counts, dtype)
    rows = x.index_select(0, groups.tokens)
    return grouped_outer(grad_gate_up, rows, groups.counts, dtype), down


@torch.no_grad()
def _add_outer(leaves: tuple[Tensor, Tensor], outer: Callable[[], tuple[Tensor, Tensor]]) -> None:
    for leaf, gradient in zip(leaves, outer(), strict=True):
        if leaf.requires_grad:
            add_gradient(leaf, gradient)


def _factors(
    weights: Float[Tensor, "tokens chosen"], groups: Groups, dtype: torch.dtype
) -> Float[Tensor, "rows"]:
    """Weight of each row; 0 for padding."""
    factors = torch.zeros(len(groups.tokens), dtype=dtype, device=weights.device)
    factors[groups.rows] = weights.flatten()[groups.order].to(dtype)
    return factors


def _combine(
    rows: Float[Tensor, "rows dim"],
    factors: Float[Tensor, "rows"] | None,
    groups: Groups,
    chosen: int,
) -> Float[Tensor, "tokens dim"]:
    """For each token the sum of its rows times their factors, in order of expert id."""
    places = torch.empty_like(groups.order)
    places[groups.order] = groups.rows
    places = places.view(-1, chosen).sort(dim=1).values
    if native_training_kernels.usable(rows):
        return native_training_kernels.combine(rows, factors, places)
    wide = accumulation_dtype(rows.dtype)
    out = torch.zeros(places.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    for column in places.unbind(dim=1):
        part = rows[column].to(wide)
        out += part if factors is None else part * factors[column, None]
    return out.to(rows.dtype)


def _swiglu(gate_up: Float[Tensor, "rows inner_twice"]) -> Float[Tensor, "rows inner"]:
    """`experts.swiglu` of the two halves."""
    gate, up = gate_up.chunk(2, dim=1)
    if native_training_kernels.usable(gate_up):
        return native_training_kernels.gated_forward(gate, up)
    return swiglu(gate, up)
