"""Training of DeepSeek Sparse Attention (DSA, DeepSeek-V3.2, section 2.1): attention over the
chosen tokens, and the KL divergence that trains the indexer, in blocks of queries.

The target of a query is the attention distribution summed over heads and L1-normalised over tokens;
the indexer's distribution is the softmax of its scores. Warm-up compares them over all visible
tokens (equation 3), sparse training over the chosen ones (equation 4). Gradients of index scores
are computed with the loss. For the backward pass attention keeps its inputs and the chosen
positions: nothing of the size of the scores, nor a mask.

In the warm-up no gradient passes through attention; on the CPU in bf16 native kernels compute it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import BFloat16, Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowlat.ops import native_training_kernels
from lowlat.ops.norm import accumulation_dtype
from lowlat.ops.sparse_attention import (
    IndexQueries,
    attended_mask,
    index_scores,
    num_dense,
    top_positions,
)

BLOCK_ELEMENTS = 2**23
"""Elements of the scores of a block of queries: [heads, queries, keys] or [queries, index_heads,
keys]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerObjective:
    """What a layer computes besides its output."""

    is_dense: bool
    """Warm-up: attention and KL divergence over all visible tokens, not over the chosen ones."""
    kl_weight: float | None
    """Factor of the summed KL divergence in the loss; None computes neither loss nor statistics."""
    sum_heads: Callable[[Tensor], Tensor]
    """Sums over the heads of other processes (tensor parallelism)."""


class IndexGradients(NamedTuple):
    """Gradients of the loss with respect to the outputs of the indexer."""

    q: Float[Tensor, "queries index_heads index_dim"]
    weights: Float[Tensor, "queries index_heads"]
    keys: Float[Tensor, "keys index_dim"]


class SparseOutput(NamedTuple):
    """Attention of some queries of a sequence."""

    out: Float[Tensor, "queries heads v_dim"]
    chosen: Int[Tensor, "sparse topk"]
    """Positions of `sparse_attention.choose_tokens`, int32."""
    statistics: Float[Tensor, "three"]
    """fp64 sums over queries: KL divergence, attention mass on the chosen tokens, and the number of
    queries of the latter, those that see more than topk tokens.
    """
    gradients: IndexGradients | None


def distills_natively(*tensors: Tensor) -> bool:
    """Whether `VarlenAttention` takes these queries, keys, values, index queries and index keys: on
    the CPU in bf16, and no gradient passes through attention.
    """
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:3])
    is_bf16 = all(x.dtype == torch.bfloat16 for x in tensors)
    return is_bf16 and not needs_gradient and native_training_kernels.usable(*tensors)


class VarlenAttention(NamedTuple):
    """Dense or sparse attention of whole packed sequences (varlen) by native kernels."""

    q: BFloat16[Tensor, "tokens heads head_dim"]
    k: BFloat16[Tensor, "tokens kv_heads head_dim"]
    v: BFloat16[Tensor, "tokens kv_heads v_dim"]
    lengths: list[int]
    scale: float

    def distill(
        self,
        index: IndexQueries,
        index_keys: BFloat16[Tensor, "tokens index_dim"],
        kl_weight: float,
    ) -> tuple[
        BFloat16[Tensor, "tokens heads v_dim"], Float[Tensor, "three"], IndexGradients | None
    ]:
        """Dense attention with the KL divergence of the indexer: output, statistics and gradients
        of `SparseOutput`.
        """
        given, out = self._dense(index, index_keys)
        weight = kl_weight if torch.is_grad_enabled() else None
        found = native_training_kernels.indexer_loss(given, weight)
        gradients = None if found.gradients is None else IndexGradients(*found.gradients)
        return out, self._statistics(found.kl, found.recall, index.topk), gradients

    def attend(
        self, index: IndexQueries, index_keys: BFloat16[Tensor, "tokens index_dim"]
    ) -> tuple[BFloat16[Tensor, "tokens heads v_dim"], Float[Tensor, "three"]]:
        """Attention over the chosen tokens, and the statistics of `SparseOutput`, without the KL
        divergence (NaN).
        """
        given, _ = self._dense(index, index_keys)
        out, recall = native_training_kernels.chosen_forward(given, *_contiguous(self.v))
        return out, self._statistics(torch.full_like(recall, torch.nan), recall, index.topk)

    def _dense(
        self, index: IndexQueries, index_keys: Tensor
    ) -> tuple[native_training_kernels.IndexedAttention, Tensor]:
        """What the kernels take, and the output of dense attention."""
        q, k, v = _contiguous(self.q, self.k, self.v)
        ends = torch.tensor(self.lengths).cumsum(0)
        out, logs = native_training_kernels.causal_forward(q, k, v, ends, self.scale)
        outputs = _contiguous(index.q, index.weights, index_keys)
        given = native_training_kernels.IndexedAttention(
            q, k, logs, ends, self.scale, *outputs, topk=index.topk
        )
        return given, out

    def _statistics(self, kl: Tensor, recall: Tensor, topk: int) -> Tensor:
        sparse = torch.cat([torch.arange(length) >= topk for length in self.lengths])
        return torch.stack([kl.double().sum(), recall[sparse].double().sum(), sparse.sum()])


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().contiguous() for x in tensors]


def attend_and_distill(
    q: Float[Tensor, "queries heads head_dim"],
    k: Float[Tensor, "keys heads head_dim"],
    v: Float[Tensor, "keys heads v_dim"],
    index: IndexQueries,
    index_keys: Float[Tensor, "keys index_dim"],
    chosen: Int[Tensor, "sparse topk"] | None,
    *,
    scale: float,
    objective: IndexerObjective,
) -> SparseOutput:
    """Attention of the last `queries` of a sequence of `keys` tokens, with the KL divergence of its
    indexer. chosen: the tokens that an earlier layer chose; None chooses.

    Scores, softmax and sums are fp32 (fp64 for fp64 inputs). The output's gradient reaches q, k and
    v only, that of the KL divergence the indexer only.
    """
    count, start = len(q), len(k) - len(q)
    widest = max(q.shape[1], index.q.shape[1])
    step = max(1, BLOCK_ELEMENTS // (widest * len(k)))
    first, is_known = num_dense(count, start, index.topk), chosen is not None
    if chosen is None:
        shape = (count - first, index.topk)
        chosen = torch.empty(shape, dtype=torch.int32, device=q.device)
    key_gradient = torch.zeros_like(index_keys, dtype=accumulation_dtype(index_keys.dtype))
    blocks = []
    for begin in range(0, count, step):
        own = slice(begin, min(begin + step, count))
        seen = start + own.stop
        blocks.append(
            _block(
                q[own],
                k[:seen],
                v[:seen],
                index.rows(own),
                index_keys[:seen],
                chosen[max(own.start - first, 0) : max(own.stop - first, 0)],
                is_known=is_known,
                key_gradient=key_gradient[:seen],
                scale=scale,
                objective=objective,
            )
        )
    return _joined(blocks, chosen, key_gradient.to(index_keys.dtype))


class _Block(NamedTuple):
    """Attention of a block of queries."""

    out: Tensor
    statistics: Tensor
    gradients: tuple[Tensor, Tensor] | None
    """With respect to index queries and head weights."""


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: IndexQueries,
    index_keys: Tensor,
    chosen: Tensor,
    *,
    is_known: bool,
    key_gradient: Tensor,
    scale: float,
    objective: IndexerObjective,
) -> _Block:
    """Fills `chosen`, unless it is known, and adds to `key_gradient`."""
    weight = objective.kl_weight
    leaves = [x.detach().requires_grad_() for x in (index.q, index.weights, index_keys)]
    scores, chooses = None, len(chosen) > 0 and not is_known
    if chooses or weight is not None:
        is_learning = weight is not None and torch.is_grad_enabled()
        with torch.set_grad_enabled(is_learning), _plainly_saved():
            scores = index_scores(IndexQueries(leaves[0], leaves[1], index.topk), leaves[2])
    if chooses:
        assert scores is not None
        own, start = scores.detach()[-len(chosen) :], len(k) - len(chosen)
        chosen.copy_(top_positions(own, start=start, topk=index.topk))
    # As an argument of the checkpointed function, a slice of the choices would be refused once the
    # next block fills its own; the function makes the masks, so that they are not kept.
    attend = partial(
        _attention,
        chosen=None if objective.is_dense else chosen,
        measures_mass=weight is not None,
        scale=scale,
    )
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        made = checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
    else:
        made = attend(q, k, v)
    out, shares, mass = made
    if weight is None or scores is None:
        return _Block(out, torch.zeros(3, dtype=torch.float64), None)
    visible = _visible(q, k)
    picked = attended_mask(visible, chosen)
    mask = visible if objective.is_dense else picked
    shares = objective.sum_heads(shares)
    total = shares.sum(dim=-1, keepdim=True)
    target = shares / total
    with _plainly_saved():
        kl = index_divergence(scores, target, mask)
    gradients = None
    if torch.is_grad_enabled():
        of_q, of_weights, of_keys = torch.autograd.grad(weight * kl, leaves)
        key_gradient += of_keys
        gradients = (of_q, of_weights)
    recall = (target * picked).sum(dim=-1)
    if not objective.is_dense:
        recall = objective.sum_heads(mass) / total[:, 0]
    sparse = recall[len(q) - len(chosen) :]
    statistics = torch.stack([kl.detach(), sparse.sum(), sparse.new_tensor(len(sparse))])
    return _Block(out, statistics.double(), gradients)


def index_divergence(
    scores: Float[Tensor, "queries keys"],
    target: Float[Tensor, "queries keys"],
    mask: Bool[Tensor, "queries keys"],
) -> Float[Tensor, ""]:
    """KL(target || softmax of the index scores over the tokens of `mask`), summed over queries. The
    target is 0 outside of the mask.
    """
    log_shares = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=-1)
    cross = target * log_shares.masked_fill(~mask, 0.0)
    return (torch.xlogy(target, target) - cross).sum()


def _attention(
    q: Tensor, k: Tensor, v: Tensor, *, chosen: Tensor | None, measures_mass: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, attention summed over heads, and the sum over heads of the attention mass that the
    chosen tokens have among the visible ones (zeros if not asked for). chosen None: all visible.
    """
    wide = accumulation_dtype(q.dtype)
    visible = _visible(q, k)
    mask = visible if chosen is None else attended_mask(visible, chosen)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide) * scale, k.to(wide))
    masked = scores.masked_fill(~mask, -torch.inf)
    shares = masked.softmax(dim=-1)
    out = torch.einsum("hqk,khv->qhv", shares, v.to(wide)).to(q.dtype)
    with torch.no_grad():
        mass = scores.new_zeros(len(q))
        if measures_mass and chosen is not None:
            whole = scores.masked_fill(~visible, -torch.inf).logsumexp(dim=-1)
            mass = (masked.logsumexp(dim=-1) - whole).exp().sum(dim=0)
        return out, shares.detach().sum(dim=0), mass


def _visible(q: Tensor, k: Tensor) -> Bool[Tensor, "queries keys"]:
    """The tokens up to each query's own."""
    return torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))


def _joined(blocks: list[_Block], chosen: Tensor, key_gradient: Tensor) -> SparseOutput:
    """The blocks as one."""
    gradients = None
    parts = [block.gradients for block in blocks if block.gradients is not None]
    if parts:
        q, weights = (torch.cat(each) for each in zip(*parts, strict=True))
        gradients = IndexGradients(q, weights, key_gradient)
    return SparseOutput(
        torch.cat([block.out for block in blocks]),
        chosen,
        torch.stack([block.statistics for block in blocks]).sum(dim=0),
        gradients,
    )


def add_index_gradients(
    out: Float[Tensor, "tokens heads v_dim"],
    index: IndexQueries,
    keys: Float[Tensor, "keys index_dim"],
    gradients: IndexGradients,
) -> Float[Tensor, "tokens heads v_dim"]:
    """Identity on `out` that adds `gradients` to the outputs of an indexer, in whatever backward
    pass reaches `out`.
    """
    made = _AddIndexGradients.apply(out, index.q, index.weights, keys, gradients)
    assert isinstance(made, Tensor)
    return made


class _AddIndexGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        q: Tensor,
        weights: Tensor,
        keys: Tensor,
        gradients: IndexGradients,
    ) -> Tensor:
        ctx.save_for_backward(*gradients)
        return out.view_as(out)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        return grad, *ctx.saved_tensors, None


def _plainly_saved() -> torch.autograd.graph.saved_tensors_hooks:
    """Saves tensors as they are, also where activation checkpointing would drop them: gradients of
    the index scores are computed at once.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
