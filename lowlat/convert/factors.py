"""The latent: one low-rank factorisation of a layer's static keys and values together.

Owns the metric that errors are measured in, the factorisation, and the tensors that follow.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor

from lowlat.convert.components import Split
from lowlat.convert.statistics import AttentionWeights, LayerStatistics

FLOOR = 1e-12
"""Of eigenvalues, relative to the largest: what is smaller is rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a latent is to reproduce, and how errors count: the cost of an error E(x) is
    tr(metric E[E(x) E(x)^T]).
    """

    maps: Float64[Tensor, "outputs inputs"]
    """Static keys, then the values of all groups, as functions of the input."""
    metric: Float64[Tensor, "outputs outputs"]
    """How errors of outputs count."""
    inputs: Float64[Tensor, "inputs inputs"]
    """Second moments of the input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """maps ~ up @ down."""

    down: Float64[Tensor, "rank inputs"]
    """The latent as a function of the input, channels of unit variance by falling importance."""
    up: Float64[Tensor, "outputs rank"]
    """Static keys and values as functions of the latent."""


def weighted_target(weights: AttentionWeights, statistics: LayerStatistics, parts: Split) -> Target:
    """Errors of keys count by what they move the attention output, errors of values by W_O."""
    head_dim = weights.q.shape[1]
    keys = torch.einsum(
        "h,hsd,hde,hte->st",
        statistics.sensitivity / head_dim,
        parts.static_queries,
        statistics.queries,
        parts.static_queries,
    )
    per_head = torch.einsum("hxd,hxe->hde", weights.o, weights.o)
    values = per_head.unflatten(0, (len(weights.v), -1)).sum(1)
    return Target(
        maps=_joined(weights, parts),
        metric=torch.block_diag(keys, *values),
        inputs=statistics.inputs,
    )


def balanced_target(weights: AttentionWeights, statistics: LayerStatistics, parts: Split) -> Target:
    """Keys and values brought to the same mean norm, all channels counting alike (TransMLA, arXiv
    2502.07864 section 4.3).
    """
    target = _joined(weights, parts)
    energy = torch.einsum("ox,xy,oy->o", target, statistics.covariance, target)
    keys = len(parts.static)
    ratio = energy[:keys].sum() / energy[keys:].sum() if keys else energy.new_ones(())
    counts = torch.ones(len(target), dtype=torch.float64)
    counts[:keys] = 1 / ratio.clamp(min=1e-30)
    return Target(maps=target, metric=counts.diag(), inputs=statistics.covariance)


def plain_target(weights: AttentionWeights, statistics: LayerStatistics, parts: Split) -> Target:
    """The matrices themselves, whatever the inputs (MHA2MLA's joint SVD, arXiv 2502.14837)."""
    target = _joined(weights, parts)
    return Target(
        maps=target,
        metric=torch.eye(len(target), dtype=torch.float64),
        inputs=torch.eye(target.shape[1], dtype=torch.float64),
    )


def factorize(target: Target, rank: int) -> Factors:
    """The factorisation of least cost: principal components of what `target` maps to, between the
    roots of its metric.
    """
    root, inverse = _roots(target.metric)
    vectors = torch.linalg.eigh(root @ _moments(target) @ root).eigenvectors
    chosen = vectors.flip(1)[:, :rank]
    down = (chosen.T @ root) @ target.maps
    size = torch.einsum("rx,xy,ry->r", down, target.inputs, down).clamp(min=1e-30).sqrt()
    return Factors(down=down / size[:, None], up=(inverse @ chosen) * size)


def rank_costs(target: Target) -> Float64[Tensor, " ranks"]:
    """The cost of factorisations of rank 0, 1, ... as `factorize` makes them."""
    ridge = FLOOR * target.metric.diagonal().max().clamp(min=1e-30)
    lower = torch.linalg.cholesky(target.metric + ridge * torch.eye(len(target.metric)))
    squares = torch.linalg.eigvalsh(lower.T @ _moments(target) @ lower).clamp(min=0)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def attention_tensors(
    weights: AttentionWeights, parts: Split, factors: Factors, *, padding: int, has_bias: bool
) -> dict[str, Tensor]:
    """The tensors of an MLA layer (`q_proj.weight`, ...) in fp64, without the output projection.

    A head's query keeps its head_dim channels, then come `padding` of zeros and the rotary ones;
    the wider head's softmax scale is made up for. Channels of the latent and of k_R are scaled so
    that what writes them and what reads them are weights of one size.
    """
    heads, head_dim, inputs = weights.q.shape
    groups, static = len(weights.v), len(parts.static)
    hidden = inputs - has_bias
    wider = (1 + (padding + len(parts.rotary)) / head_dim) ** 0.5
    keys = torch.einsum("hsd,sr->hdr", parts.static_queries, factors.up[:static])
    values = factors.up[static:].unflatten(0, (groups, -1))
    values = values.repeat_interleave(heads // groups, dim=0)
    turned = torch.einsum("hrd,hdx->hrx", parts.rotary_queries, weights.q)
    latent = _evenly(factors.down[:, :hidden], torch.cat([keys, values], dim=1).flatten(0, 1).T)
    pairs = [_by_pair(part) for part in (parts.rotary[:, :hidden], turned[..., :hidden])]
    rotary = _evenly(*pairs).repeat(2)
    rows = torch.cat([factors.down * latent[:, None], parts.rotary * rotary[:, None]])
    still, keys = (F.pad(rows, (0, 0, 0, padding)) for rows in (weights.q, keys))
    up = torch.cat([keys, values], dim=1).flatten(0, 1)
    queries = torch.cat([still, turned / rotary[:, None]], dim=1).flatten(0, 1) * wider
    tensors = {"q_proj": queries, "kv_a_proj_with_mqa": rows}
    found = {f"{name}.weight": whole[:, :hidden] for name, whole in tensors.items()}
    if has_bias:
        found |= {f"{name}.bias": whole[:, hidden] for name, whole in tensors.items()}
    return found | {"kv_b_proj.weight": up / latent}


def _evenly(
    given: Float64[Tensor, "channels given"], read: Float64[Tensor, "channels read"]
) -> Float64[Tensor, " channels"]:
    """Factors on channels that make the weights that write a channel as large as those that read it
    (times the inverse): training moves both alike.
    """
    sizes = [part.square().mean(1).sqrt().clamp(min=1e-30) for part in (given, read)]
    return (sizes[1] / sizes[0]).sqrt()


def _by_pair(rows: Float64[Tensor, "*heads rotary inputs"]) -> Float64[Tensor, "pairs all"]:
    """All weights of the channels i and i + rotary / 2, which turn together."""
    halves = rows.unflatten(-2, (2, -1)).movedim(-2, 0)
    return halves.flatten(1)


def _moments(target: Target) -> Float64[Tensor, "outputs outputs"]:
    return target.maps @ target.inputs @ target.maps.T


def _joined(weights: AttentionWeights, parts: Split) -> Float64[Tensor, "outputs inputs"]:
    return torch.cat([parts.static, weights.v.flatten(0, 1)])


def _roots(matrix: Float64[Tensor, "n n"]) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a symmetric matrix that is positive up to rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp(min=FLOOR * float(values[-1].clamp(min=1e-30)))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
