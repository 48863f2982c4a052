"""Fused linear cross entropy (chunked cross entropy): LM head and loss in chunks of
rows, with gradients computed in the forward pass. No [tokens, vocab] matrix exists (as in Liger
Kernel, arXiv 2410.10989).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowlat.ops import native_training_kernels
from lowlat.ops.norm import accumulation_dtype

CHUNK_ELEMENTS = 2**23
"""Logits of one chunk: 32 MiB in fp32."""


class CrossEntropy(NamedTuple):
    """Sums over the counted rows."""

    total: Float[Tensor, ""]
    """nll + z_weight * z, the only differentiable one."""
    nll: Float[Tensor, ""]
    """Negative log-likelihoods, nats."""
    z: Float[Tensor, ""]
    """Squares of the log of the softmax's denominator, log-sum-exp (PaLM, arXiv 2204.02311
    section 5)."""


def linear_cross_entropy(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "tokens"],
    counted: Bool[Tensor, "tokens"],
    *,
    z_weight: float = 0.0,
) -> CrossEntropy:
    """Cross entropy of `targets` under softmax(hidden W^T), summed over the rows `counted`.

    The product has hidden's dtype; logits, softmax and sums are fp32 (fp64 for fp64 inputs).
    """
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
        hidden, weight = hidden.detach(), weight.detach()
    total, nll, z = _LinearCrossEntropy.apply(hidden, weight, targets, counted, z_weight)  # pyright: ignore[reportGeneralTypeIssues]
    return CrossEntropy(total, nll, z)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        counted: Tensor,
        z_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = torch.zeros(2, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)

        def gradient(rows: slice, logits: Tensor) -> Tensor:
            return _chunk(logits, targets[rows], counted[rows], z_weight, sums)

        gradients = head_gradients(hidden, weight, ctx.needs_input_grad[:2], gradient)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        nll, z = sums.unbind()
        ctx.mark_non_differentiable(nll, z)
        return nll + z_weight * z, nll, z

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, _nll: Tensor | None, _z: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        return *scaled_gradients(ctx, grad), None, None, None


def head_gradients(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    needed: Sequence[bool],
    gradient: Callable[[slice, Float[Tensor, "rows vocab"]], Float[Tensor, "rows vocab"]],
    *,
    elements: int | None = None,
) -> tuple[Float[Tensor, "tokens hidden"] | None, Float[Tensor, "vocab hidden"] | None]:
    """Gradients of a loss of the logits hidden W^T, computed in chunks of rows.

    gradient: takes the rows and logits of a chunk, which it may overwrite, and returns the gradient
    of the loss by the logits; needed: whether hidden and weight need gradients. The gradient of
    hidden has its dtype, that of the weight is summed in fp32 (fp64 for fp64 inputs). A chunk has
    up to `elements` logits (by default CHUNK_ELEMENTS).
    """
    matrix = weight.to(hidden.dtype)
    needs_hidden, needs_weight = needed
    wide = accumulation_dtype(hidden.dtype)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
    most = max(1, (elements or CHUNK_ELEMENTS) // weight.shape[0])
    chunks = even_chunks(hidden.shape[0], most)
    buffer = hidden.new_empty(chunks[0].stop if chunks else 0, weight.shape[0])
    for chunk in chunks:
        logits = torch.mm(hidden[chunk], matrix.T, out=buffer[: chunk.stop - chunk.start])
        grad = gradient(chunk, logits).to(hidden.dtype)
        if grad_hidden is not None:
            torch.mm(grad, matrix, out=grad_hidden[chunk])
        if grad_weight is not None:
            grad_weight += grad.T @ hidden[chunk]
    return grad_hidden, grad_weight


def even_chunks(rows: int, most: int) -> list[slice]:
    """The fewest slices of at most `most` rows each; all have the same length but the last, which
    may be shorter.
    """
    size = -(-rows // max(1, -(-rows // most)))
    return [slice(at, min(at + size, rows)) for at in range(0, rows, max(1, size))]


def scaled_gradients(
    ctx: Any, grad: Float[Tensor, ""]
) -> tuple[Float[Tensor, "tokens hidden"] | None, Float[Tensor, "vocab hidden"] | None]:
    """The gradients saved in `ctx` by the forward pass, times the gradient of the loss."""
    grad_hidden, grad_weight = ctx.saved_tensors
    if grad_hidden is not None:
        grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
    if grad_weight is not None:
        grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
    return grad_hidden, grad_weight


def _chunk(
    product: Tensor,
    targets: Tensor,
    counted: Tensor,
    z_weight: float,
    sums: Tensor,
) -> Tensor:
    """Add this chunk's nll and z to `sums`; the gradient of total by the logits, [rows, vocab]."""
    if native_training_kernels.usable(product):
        nll, z = native_training_kernels.entropy(product, targets, counted, z_weight)
        sums += torch.stack([nll.sum(), z.sum()])
        return product
    logits = product.to(sums.dtype)
    denominator = logits.logsumexp(dim=1)
    chosen = logits.gather(1, targets[:, None])[:, 0]
    mask = counted.to(sums.dtype)
    sums[0] += ((denominator - chosen) * mask).sum()
    sums[1] += (denominator.square() * mask).sum()
    grad = logits.sub_(denominator[:, None]).exp_()
    grad.mul_((mask * (1 + 2 * z_weight * denominator))[:, None])
    return grad.scatter_add_(1, targets[:, None], -mask[:, None])
