"""Distillation loss: fused forward KL divergence of a student's logits from a teacher's, in chunks
of rows as in `cross_entropy`, so that neither matrix of logits exists.

The loss is sum p (log p - log q) with p the teacher's and q the student's next-token distribution;
its gradient by the student's logits is q - p.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lowlat.ops import native_training_kernels
from lowlat.ops.cross_entropy import head_gradients, scaled_gradients
from lowlat.ops.norm import accumulation_dtype

BLOCK_ELEMENTS = 2**18
"""Logits whose distributions PyTorch computes at once: 1 MiB in fp32, which fits CPU caches."""
NATIVE_PIECE_BYTES = 2**26
"""Bytes of a chunk of logits, the student's or the teacher's, for the native kernels, which do not
copy it. Products with the head of a large vocabulary are twice as fast with 512 rows as with 170.
"""


class Divergence(NamedTuple):
    """Sums over the counted rows."""

    total: Float[Tensor, ""]
    """kl + nll_weight * nll, the only differentiable one."""
    kl: Float[Tensor, ""]
    """Divergences of the student's distributions from the teacher's, nats."""
    nll: Float[Tensor, ""]
    """Negative log-likelihoods of the targets under the student, nats."""


def linear_divergence(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    teacher_hidden: Float[Tensor, "tokens teacher_hidden"],
    teacher_weight: Float[Tensor, "vocab teacher_hidden"],
    targets: Int[Tensor, "tokens"],
    counted: Bool[Tensor, "tokens"],
    *,
    nll_weight: float = 0.0,
) -> Divergence:
    """KL(softmax(teacher_hidden V^T) || softmax(hidden W^T)) over the rows `counted`, plus
    nll_weight times the cross entropy of `targets`. The teacher gets no gradient.

    Products have the dtypes of the hidden states; logits, softmax and sums are fp32 (fp64 for fp64
    inputs).
    """
    if not torch.is_grad_enabled():  # needs_input_grad ignores no_grad
        hidden, weight = hidden.detach(), weight.detach()
    taught = teacher_hidden.detach(), teacher_weight.detach()
    total, kl, nll = _LinearDivergence.apply(hidden, weight, *taught, targets, counted, nll_weight)  # pyright: ignore[reportGeneralTypeIssues]
    return Divergence(total, kl, nll)


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        targets: Tensor,
        counted: Tensor,
        nll_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[:2]
        teacher_matrix = teacher_weight.to(teacher_hidden.dtype)
        sums = torch.zeros(2, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)
        buffer: list[Tensor] = []

        def gradient(rows: slice, logits: Tensor) -> Tensor:
            if not buffer:  # the first chunk is the largest
                buffer.append(torch.empty_like(logits, dtype=teacher_hidden.dtype))
            taught = buffer[0][: len(logits)]
            torch.mm(teacher_hidden[rows], teacher_matrix.T, out=taught)
            given = logits, taught, targets[rows], counted[rows], nll_weight, any(needed)
            sums.add_(_piece(*given))
            return logits

        native = native_training_kernels.usable(hidden, teacher_hidden)
        elements = NATIVE_PIECE_BYTES // hidden.element_size() if native else None
        gradients = head_gradients(hidden, weight, needed, gradient, elements=elements)
        ctx.save_for_backward(*gradients)
        ctx.weight_dtype = weight.dtype
        kl, nll = sums.unbind()
        ctx.mark_non_differentiable(kl, nll)
        return kl + nll_weight * nll, kl, nll

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, _kl: Tensor | None, _nll: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        return *scaled_gradients(ctx, grad), None, None, None, None, None


def _piece(
    logits: Tensor,
    taught: Tensor,
    targets: Tensor,
    counted: Tensor,
    nll_weight: float,
    wants_gradient: bool,
) -> Tensor:
    """Sums of KL and nll over some rows; `logits` become the gradient as in `_block`."""
    if native_training_kernels.usable(logits, taught):
        found = native_training_kernels.divergence(
            logits, taught, targets, counted, nll_weight, wants_gradient=wants_gradient
        )
        return torch.stack(found).sum(dim=1)
    mask = counted.to(accumulation_dtype(logits.dtype))
    sums = mask.new_zeros(2)
    block = max(1, BLOCK_ELEMENTS // logits.shape[1])
    parts = (x.split(block) for x in (logits, taught, targets, mask))
    for q, p, target, keep in zip(*parts, strict=True):
        sums.add_(_block(q, p, target, keep, nll_weight, wants_gradient))
    return sums


def _block(
    logits: Tensor,
    taught: Tensor,
    targets: Tensor,
    mask: Tensor,
    nll_weight: float,
    wants_gradient: bool,
) -> Tensor:
    """KL and nll of some rows; with `wants_gradient`, `logits` become the gradient of kl +
    nll_weight * nll.
    """
    log_q = torch.log_softmax(logits, dim=1, dtype=mask.dtype)
    log_p = torch.log_softmax(taught, dim=1, dtype=mask.dtype)
    nll = -log_q.gather(1, targets[:, None])[:, 0]
    surplus = log_p - log_q
    p = log_p.exp_()
    kl = torch.bmm(p[:, None], surplus[:, :, None]).flatten()  # one pass; vecdot takes two
    if wants_gradient:
        grad = torch.sub(log_q.exp_(), p, out=p)
        if nll_weight:
            grad.add_(log_q, alpha=nll_weight)
            grad.scatter_add_(1, targets[:, None], grad.new_full((len(grad), 1), -nll_weight))
        logits.copy_(grad.mul_(mask[:, None]))
    return torch.stack([kl @ mask, nll @ mask])
