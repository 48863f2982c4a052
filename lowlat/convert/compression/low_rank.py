"""Low-rank factorisation of a layer's NoPE keys and values, jointly, into the MLA latent: PCA of
calibration activations (activation-aware SVD).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor

from lowlat.convert.compression.components import DecoupledKeys
from lowlat.convert.compression.statistics import AttentionWeights, LayerStatistics

FLOOR = 1e-12
"""Smallest eigenvalue relative to the largest; smaller ones are rounding errors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentTarget:
    """The linear maps that a latent approximates, and the metric of their error e(x):
    tr(metric E[e(x) e(x)^T]).
    """

    maps: Float64[Tensor, "outputs inputs"]
    """NoPE keys, then the values of all groups, as functions of the input."""
    metric: Float64[Tensor, "outputs outputs"]
    """Weights of output errors."""
    inputs: Float64[Tensor, "inputs inputs"]
    """Second moments of the input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """maps ~ up @ down."""

    down: Float64[Tensor, "rank inputs"]
    """The latent as a function of the input: channels of unit variance (whitening), by falling
    importance."""
    up: Float64[Tensor, "outputs rank"]
    """NoPE keys and values as functions of the latent."""


def weighted_target(
    weights: AttentionWeights, statistics: LayerStatistics, keys: DecoupledKeys
) -> LatentTarget:
    """Key errors weighted by the change of the attention output they cause, value errors by W_O."""
    head_dim = weights.q.shape[1]
    key_metric = torch.einsum(
        "h,hsd,hde,hte->st",
        statistics.sensitivity / head_dim,
        keys.nope_queries,
        statistics.queries,
        keys.nope_queries,
    )
    per_head = torch.einsum("hxd,hxe->hde", weights.o, weights.o)
    value_metrics = per_head.unflatten(0, (len(weights.v), -1)).sum(1)
    return LatentTarget(
        maps=_joined(weights, keys),
        metric=torch.block_diag(key_metric, *value_metrics),
        inputs=statistics.inputs,
    )


def balanced_target(
    weights: AttentionWeights, statistics: LayerStatistics, keys: DecoupledKeys
) -> LatentTarget:
    """Balanced KV (TransMLA, arXiv 2502.07864 section 4.3): keys and values scaled to the same mean
    norm, all channels weighted alike.
    """
    maps = _joined(weights, keys)
    energy = torch.einsum("ox,xy,oy->o", maps, statistics.covariance, maps)
    nope = len(keys.nope)
    ratio = energy[:nope].sum() / energy[nope:].sum() if nope else energy.new_ones(())
    scale = torch.ones(len(maps), dtype=torch.float64)
    scale[:nope] = 1 / ratio.clamp(min=1e-30)
    return LatentTarget(maps=maps, metric=scale.diag(), inputs=statistics.covariance)


def plain_target(
    weights: AttentionWeights, statistics: LayerStatistics, keys: DecoupledKeys
) -> LatentTarget:
    """Joint truncated SVD of the matrices, independent of the inputs (MHA2MLA, arXiv
    2502.14837)."""
    maps = _joined(weights, keys)
    return LatentTarget(
        maps=maps,
        metric=torch.eye(len(maps), dtype=torch.float64),
        inputs=torch.eye(maps.shape[1], dtype=torch.float64),
    )


def factorize(target: LatentTarget, rank: int) -> Factors:
    """The factorisation of least error: principal components (PCA) of the outputs, between the
    square roots of the metric.
    """
    root, inverse = _roots(target.metric)
    vectors = torch.linalg.eigh(root @ _moments(target) @ root).eigenvectors
    chosen = vectors.flip(1)[:, :rank]
    down = (chosen.T @ root) @ target.maps
    size = torch.einsum("rx,xy,ry->r", down, target.inputs, down).clamp(min=1e-30).sqrt()
    return Factors(down=down / size[:, None], up=(inverse @ chosen) * size)


def rank_errors(target: LatentTarget) -> Float64[Tensor, " ranks"]:
    """Errors of `factorize` for rank 0, 1, ..."""
    ridge = FLOOR * target.metric.diagonal().max().clamp(min=1e-30)
    lower = torch.linalg.cholesky(target.metric + ridge * torch.eye(len(target.metric)))
    squares = torch.linalg.eigvalsh(lower.T @ _moments(target) @ lower).clamp(min=0)
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


def attention_tensors(
    weights: AttentionWeights,
    keys: DecoupledKeys,
    factors: Factors,
    *,
    padding: int,
    has_bias: bool,
) -> dict[str, Tensor]:
    """The tensors of an MLA layer (`q_proj.weight`, ...) in fp64, without the output projection.

    A head's query has its head_dim channels, then `padding` zeros, then the RoPE channels. A factor
    corrects the softmax scale of the wider head. Channels of the latent and of k_R are scaled so
    that the weights that write them and those that read them have equal magnitudes.
    """
    heads, head_dim, inputs = weights.q.shape
    groups, num_nope = len(weights.v), len(keys.nope)
    hidden = inputs - has_bias
    scale = (1 + (padding + len(keys.rope)) / head_dim) ** 0.5
    key_up = torch.einsum("hsd,sr->hdr", keys.nope_queries, factors.up[:num_nope])
    values = factors.up[num_nope:].unflatten(0, (groups, -1))
    values = values.repeat_interleave(heads // groups, dim=0)
    rope_q = torch.einsum("hrd,hdx->hrx", keys.rope_queries, weights.q)
    up = torch.cat([key_up, values], dim=1).flatten(0, 1)
    latent = _balance(factors.down[:, :hidden], up.T)
    pairs = [_by_pair(part) for part in (keys.rope[:, :hidden], rope_q[..., :hidden])]
    rotary = _balance(*pairs).repeat(2)
    entry = torch.cat([factors.down * latent[:, None], keys.rope * rotary[:, None]])
    nope_q, key_up = (F.pad(part, (0, 0, 0, padding)) for part in (weights.q, key_up))
    up = torch.cat([key_up, values], dim=1).flatten(0, 1)
    queries = torch.cat([nope_q, rope_q / rotary[:, None]], dim=1).flatten(0, 1) * scale
    tensors = {"q_proj": queries, "kv_a_proj_with_mqa": entry}
    found = {f"{name}.weight": whole[:, :hidden] for name, whole in tensors.items()}
    if has_bias:
        found |= {f"{name}.bias": whole[:, hidden] for name, whole in tensors.items()}
    return found | {"kv_b_proj.weight": up / latent}


def _balance(
    write: Float64[Tensor, "channels writers"], read: Float64[Tensor, "channels readers"]
) -> Float64[Tensor, " channels"]:
    """Factors on channels that equalise the magnitudes of the weights that write a channel and of
    those that read it (which get the inverse factor), so that training changes both alike.
    """
    sizes = [part.square().mean(1).sqrt().clamp(min=1e-30) for part in (write, read)]
    return (sizes[1] / sizes[0]).sqrt()


def _by_pair(weights: Float64[Tensor, "*heads rotary inputs"]) -> Float64[Tensor, "pairs all"]:
    """The weights of each pair of channels (i, i + rotary / 2), which RoPE rotates together."""
    halves = weights.unflatten(-2, (2, -1)).movedim(-2, 0)
    return halves.flatten(1)


def _moments(target: LatentTarget) -> Float64[Tensor, "outputs outputs"]:
    return target.maps @ target.inputs @ target.maps.T


def _joined(weights: AttentionWeights, keys: DecoupledKeys) -> Float64[Tensor, "outputs inputs"]:
    return torch.cat([keys.nope, weights.v.flatten(0, 1)])


def _roots(matrix: Float64[Tensor, "n n"]) -> tuple[Tensor, Tensor]:
    """Square root and inverse square root of a symmetric matrix that is positive up to rounding."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values = values.clamp(min=FLOOR * float(values[-1].clamp(min=1e-30)))
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T
