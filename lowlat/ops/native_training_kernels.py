"""Native kernels of training between matrix products, and the conditions for their use.

`autograd`, `grouped`, `cross_entropy` and `divergence` have the reference implementations.
"""

from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float, Float32, Int64
from torch import Tensor

from lowlat.ops import native


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on the CPU, all bf16 or all fp32."""
    dtype = tensors[0].dtype
    if dtype not in (torch.bfloat16, torch.float32):
        return False
    alike = all(t.device.type == "cpu" and t.dtype == dtype for t in tensors)
    return alike and all(type(t) is Tensor for t in tensors) and native.available()


def norm_forward(
    x: Float[Tensor, "rows dim"], weight: Float32[Tensor, "dim"], eps: float
) -> tuple[Float[Tensor, "rows dim"], Float32[Tensor, "rows"]]:
    """RMSNorm and the reciprocal of each row's root mean square."""
    out, inverse = torch.empty_like(x), torch.empty(x.shape[0])
    native.module().norm_forward(x.detach(), weight.detach(), eps, out, inverse)
    return out, inverse


def norm_backward(
    x: Float[Tensor, "rows dim"],
    weight: Float32[Tensor, "dim"],
    inverse: Float32[Tensor, "rows"],
    grad: Float[Tensor, "rows dim"],
) -> tuple[Float[Tensor, "rows dim"], Float32[Tensor, "dim"]]:
    """Gradients of x and of the weight."""
    module = native.module()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    partial = torch.empty(module.norm_pieces(x.shape[0]), x.shape[1])
    given = x.detach(), weight.detach(), 0.0, inverse, grad
    module.norm_backward(*given, grad_x, grad_weight, partial)
    return grad_x, grad_weight


def gated_forward(
    gate: Float[Tensor, "rows inner"], up: Float[Tensor, "rows inner"]
) -> Float[Tensor, "rows inner"]:
    """silu(gate) * up; both may be columns of one wider matrix."""
    inner = torch.empty(gate.shape, dtype=gate.dtype)
    native.module().gated_forward(gate.detach(), up.detach(), inner)
    return inner


def gated_backward(
    gate_up: Float[Tensor, "rows inner_twice"],
    grad: Float[Tensor, "rows inner"],
    factors: Float32[Tensor, "rows"] | None,
) -> tuple[
    Float[Tensor, "rows inner"], Float[Tensor, "rows inner_twice"], Float32[Tensor, "rows"] | None
]:
    """Recomputed inner, the gradient of gate_up, and that of the factors, if any: `grad` is
    multiplied by them row by row.
    """
    gate, up = gate_up.chunk(2, dim=1)
    grad_gate_up = torch.empty_like(gate_up)
    grad_gate, grad_up = grad_gate_up.chunk(2, dim=1)
    inner = torch.empty(gate.shape, dtype=gate.dtype)
    grad_factors = None if factors is None else torch.empty(gate.shape[0])
    native.module().gated_backward(gate, up, grad, factors, inner, grad_gate, grad_up, grad_factors)
    return inner, grad_gate_up, grad_factors


def gated_gradients(
    gate: Float[Tensor, "rows inner"],
    up: Float[Tensor, "rows inner"],
    grad: Float[Tensor, "rows inner"],
) -> tuple[Float[Tensor, "rows inner"], Float[Tensor, "rows inner"]]:
    """Gradients of gate and up, both contiguous, given that of silu(gate) * up."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    native.module().gated_backward(gate, up, grad, None, None, grad_gate, grad_up, None)
    return grad_gate, grad_up


def entropy(
    logits: Float[Tensor, "rows vocab"],
    targets: Int64[Tensor, "rows"],
    counted: Bool[Tensor, "rows"],
    z_weight: float,
) -> tuple[Float32[Tensor, "rows"], Float32[Tensor, "rows"]]:
    """Turn `logits` into the gradient of nll + z_weight * z in place; returns nll and z."""
    nll, z = torch.empty(2, logits.shape[0])
    shown = counted.contiguous().view(torch.uint8)
    native.module().entropy(logits, targets.contiguous(), shown, z_weight, nll, z)
    return nll, z


def divergence(
    logits: Float[Tensor, "rows vocab"],
    taught: Float[Tensor, "rows vocab"],
    targets: Int64[Tensor, "rows"],
    counted: Bool[Tensor, "rows"],
    nll_weight: float,
    *,
    wants_gradient: bool,
) -> tuple[Float32[Tensor, "rows"], Float32[Tensor, "rows"]]:
    """KL(softmax(taught) || softmax(logits)) and nll of every row. With `wants_gradient` turns
    `logits` into the gradient of kl + nll_weight * nll in place.
    """
    kl, nll = torch.empty(2, logits.shape[0])
    shown = counted.contiguous().view(torch.uint8)
    given = logits, taught, targets.contiguous(), shown
    native.module().divergence(*given, nll_weight, wants_gradient, kl, nll)
    return kl, nll


def rotation(
    x: Float[Tensor, "tokens heads dim"],
    cos: Float32[Tensor, "tokens pairs"],
    sin: Float32[Tensor, "tokens pairs"],
    *,
    interleave: bool,
    is_inverse: bool = False,
) -> Float[Tensor, "tokens heads dim"]:
    """`rope.apply_rope`, to the bit; with `is_inverse` by the negative angles. x and the tables may
    be column slices of wider tensors; both tables then have the same width.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    native.module().rotation(x.detach(), cos, sin, interleave, is_inverse, out)
    return out


def combine(
    rows: Float[Tensor, "rows dim"],
    factors: Float32[Tensor, "rows"] | None,
    places: Int64[Tensor, "tokens chosen"],
) -> Float[Tensor, "tokens dim"]:
    """For each token the sum of its rows, each times its factor, in the order of `places`."""
    out = rows.new_empty(places.shape[0], rows.shape[1])
    native.module().combine(rows, factors, places, out)
    return out


def multiplies_groups(rows: Float[Tensor, "rows width"], *factors: Float[Tensor, "..."]) -> bool:
    """Whether `grouped` and `outer` are faster than oneDNN for these: bf16 on a CPU with AVX-512
    bf16 dot products and without AMX. factors: weights for `grouped`, other rows for `outer`.
    """
    if not (rows.dtype == torch.bfloat16 and usable(rows)) or native.level() != "avx512":
        return False
    plain = all(type(f.detach()) is Tensor and f.is_contiguous() for f in factors)
    return plain and all(f.dtype in (torch.bfloat16, torch.float32) for f in factors)


def grouped(
    rows: BFloat16[Tensor, "rows width"],
    weight: Float[Tensor, "experts out in"],
    counts: Int64[Tensor, "experts"],
    *,
    is_transposed: bool = False,
) -> BFloat16[Tensor, "rows outputs"]:
    """Rows sorted by expert, each times the matrix of its expert, rounded to bf16: x W^T, or with
    `is_transposed` x W.
    """
    out = rows.new_empty(rows.shape[0], weight.shape[2 if is_transposed else 1])
    native.module().grouped(rows.detach(), weight.detach(), counts, is_transposed, out)
    return out


def outer(
    left: BFloat16[Tensor, "rows out"],
    right: BFloat16[Tensor, "rows in"],
    counts: Int64[Tensor, "experts"],
) -> Float32[Tensor, "experts out in"]:
    """left^T right over the rows of each expert, in fp32; zero without rows."""
    sums = torch.empty(len(counts), left.shape[1], right.shape[1])
    native.module().outer(left.detach(), right.detach(), counts, sums)
    return sums


def causal_forward(
    q: BFloat16[Tensor, "tokens heads key_dim"],
    k: BFloat16[Tensor, "tokens kv_heads key_dim"],
    v: BFloat16[Tensor, "tokens kv_heads value_dim"],
    ends: Int64[Tensor, "sequences"],
    scale: float,
) -> tuple[BFloat16[Tensor, "tokens heads value_dim"], Float32[Tensor, "tokens heads"]]:
    """Causal attention of sequences that end at `ends`, and the logs of its denominators."""
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype)
    logs = torch.empty(q.shape[:2])
    given = (x.detach() for x in (q, k, v))
    native.module().causal_forward(*given, ends, scale, out, logs)
    return out, logs


def causal_backward(
    q: BFloat16[Tensor, "tokens heads key_dim"],
    k: BFloat16[Tensor, "tokens kv_heads key_dim"],
    v: BFloat16[Tensor, "tokens kv_heads value_dim"],
    ends: Int64[Tensor, "sequences"],
    scale: float,
    out: BFloat16[Tensor, "tokens heads value_dim"],
    logs: Float32[Tensor, "tokens heads"],
    grad: BFloat16[Tensor, "tokens heads value_dim"],
) -> tuple[
    BFloat16[Tensor, "tokens heads key_dim"],
    BFloat16[Tensor, "tokens kv_heads key_dim"],
    BFloat16[Tensor, "tokens kv_heads value_dim"],
]:
    """Gradients of q, k and v."""
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    given = (x.detach() for x in (q, k, v))
    module = native.module()
    module.causal_backward(*given, ends, scale, out.detach(), logs, grad, *grads)
    return grads


class IndexedAttention(NamedTuple):
    """Attention of `causal_forward` and the outputs of an indexer, all contiguous."""

    q: BFloat16[Tensor, "tokens heads key_dim"]
    k: BFloat16[Tensor, "tokens kv_heads key_dim"]
    logs: Float32[Tensor, "tokens heads"]
    """Log-sum-exp of the scores, from `causal_forward`."""
    ends: Int64[Tensor, "sequences"]
    scale: float
    index_q: BFloat16[Tensor, "tokens index_heads index_dim"]
    index_weights: Float32[Tensor, "tokens index_heads"]
    index_k: BFloat16[Tensor, "tokens index_dim"]
    topk: int


class IndexerLoss(NamedTuple):
    """The indexer's KL divergence and recall of every query, and the gradients of its outputs."""

    kl: Float32[Tensor, "tokens"]
    recall: Float32[Tensor, "tokens"]
    """Attention mass on the topk chosen tokens; 1 for queries that see at most topk tokens."""
    gradients: (
        tuple[
            BFloat16[Tensor, "tokens index_heads index_dim"],
            Float32[Tensor, "tokens index_heads"],
            BFloat16[Tensor, "tokens index_dim"],
        ]
        | None
    )
    """Gradients of the weighted KL divergence by index queries, head weights and index keys."""


def indexer_loss(given: IndexedAttention, weight: float | None) -> IndexerLoss:
    """KL divergence of the indexer from the attention, summed over heads and normalised; with
    `weight`, the gradients of weight * KL.
    """
    kl, recall = torch.empty(2, len(given.q))
    gradients = None
    if weight is not None:
        gradients = (
            torch.empty_like(given.index_q),
            torch.empty_like(given.index_weights),
            torch.empty_like(given.index_k),
        )
    outputs = (kl, recall, *(gradients or (None, None, None)))
    native.module().indexer_loss(*given, weight or 0.0, *outputs)
    return IndexerLoss(kl, recall, gradients)


def chosen_forward(
    given: IndexedAttention, v: BFloat16[Tensor, "tokens kv_heads value_dim"]
) -> tuple[BFloat16[Tensor, "tokens heads value_dim"], Float32[Tensor, "tokens"]]:
    """Attention over the tokens that the indexer chooses, and the recall of `indexer_loss`."""
    kl, recall = torch.empty(2, len(v))
    out = torch.empty(*given.q.shape[:2], v.shape[2], dtype=v.dtype)
    native.module().indexer_loss(*given, 0.0, kl, recall, None, None, None, v, out)
    return out, recall
