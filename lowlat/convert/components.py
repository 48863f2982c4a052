"""Keys as complex components: which of them keep turning with position, which stand still.

A pair of channels that turns together is one complex number; for each frequency the groups' keys
form a vector, and any unitary change of basis of it commutes with the rotation. Owns the change of
basis of each recipe and what it costs a component to stand still.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Complex128, Float64, Int64
from torch import Tensor

from lowlat.convert.statistics import AttentionWeights, LayerStatistics

Basis = Callable[[AttentionWeights, LayerStatistics], tuple[Tensor, Tensor]]
"""The unitary [pairs, groups, components] of each frequency, and the factors [pairs, groups] that
groups' keys are multiplied by before it (their queries are divided).
"""
Priority = Callable[[LayerStatistics, Tensor], Tensor]
"""From the cost [pairs, components] of standing still to which component should rather turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """Keys and queries of one layer in a basis of components; those of a pair in order of falling
    priority.
    """

    keys: Complex128[Tensor, "pairs components inputs"]
    """Each component as a function of the input."""
    queries: Complex128[Tensor, "heads pairs components head_dim"]
    """What a head's query multiplies it by (conjugated), as a function of the real query."""
    cost: Float64[Tensor, "pairs components"]
    """Squared movement of the attention output if the component stands still."""
    priority: Float64[Tensor, "pairs components"]
    """Those of largest priority turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """A layer's keys in two parts, real numbers."""

    rotary: Float64[Tensor, "rotary inputs"]
    """Channels that turn: real parts, then imaginary ones."""
    rotary_queries: Float64[Tensor, "heads rotary head_dim"]
    frequencies: Float64[Tensor, " turning"]
    """Of each pair of rotary channels."""
    static: Float64[Tensor, "static inputs"]
    """Channels that do not."""
    static_queries: Float64[Tensor, "heads static head_dim"]


def components(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    basis: Basis,
    priority: Priority,
    *,
    keeps_mean: bool,
) -> Components:
    """The keys of a layer in `basis`.

    keeps_mean: components that stand still are multiplied by their mean rotation, which makes their
    cost energy * (1 - |mean|^2) instead of energy.
    """
    unitary, factors = basis(weights, statistics)
    pairs = len(weights.frequencies)
    groups, heads = len(weights.k), len(weights.q)
    raw = torch.complex(weights.k[:, :pairs], weights.k[:, pairs:])
    keys = torch.einsum("lgj,lg,glx->ljx", unitary.conj(), factors.to(raw), raw)
    per_group = heads // groups
    mixing = (unitary.conj() / factors[:, :, None]).repeat_interleave(per_group, dim=1)
    eye = torch.eye(2 * pairs, dtype=torch.float64)
    queries = torch.einsum("lhj,ld->hljd", mixing, torch.complex(eye[:pairs], eye[pairs:]))
    energy = torch.einsum("ljx,xy,ljy->lj", keys, statistics.inputs.to(keys), keys.conj()).real
    diagonal = statistics.queries.diagonal(dim1=1, dim2=2)
    asked = (diagonal[:, :pairs] + diagonal[:, pairs:]) * statistics.sensitivity[:, None]
    if keeps_mean:
        asked = asked * (1 - statistics.rotation.abs().square())
    head_dim = 2 * pairs
    cost = torch.einsum("hl,lhj->lj", asked, mixing.abs().square()) * energy / head_dim
    cost = cost * weights.magnitude**4
    wanted = priority(statistics, cost)
    order = wanted.argsort(dim=1, descending=True, stable=True)
    return Components(
        keys=keys.take_along_dim(order[:, :, None], dim=1),
        queries=queries.take_along_dim(order[None, :, :, None], dim=2),
        cost=cost.take_along_dim(order, dim=1),
        priority=wanted.take_along_dim(order, dim=1),
    )


def split(
    parts: Components,
    weights: AttentionWeights,
    statistics: LayerStatistics,
    turning: Int64[Tensor, " turning"],
    *,
    keeps_mean: bool,
) -> Split:
    """`parts` with the components numbered `turning` (pair * components + component) rotary."""
    pairs, count, inputs = parts.keys.shape
    keys = parts.keys.reshape(pairs * count, inputs)
    queries = parts.queries.flatten(1, 2)
    stays = torch.ones(pairs * count, dtype=torch.bool)
    stays[turning] = False
    static = queries[:, stays] * weights.magnitude**2
    if keeps_mean:
        mean = statistics.rotation.repeat_interleave(count, dim=1)
        static = static * mean[:, stays, None]
    return Split(
        rotary=_real(keys[turning]),
        rotary_queries=_real(queries[:, turning]),
        frequencies=weights.frequencies.repeat_interleave(count)[turning],
        static=_real(keys[stays]),
        static_queries=_real(static),
    )


def weighted_basis(
    weights: AttentionWeights, statistics: LayerStatistics
) -> tuple[Complex128[Tensor, "pairs groups groups"], Float64[Tensor, "pairs groups"]]:
    """Eigenvectors of the complex keys' covariance, groups weighed by what their queries ask."""
    pairs, groups = len(weights.frequencies), len(weights.k)
    raw = torch.complex(weights.k[:, :pairs], weights.k[:, pairs:])
    covariance = torch.einsum("glx,xy,hly->lgh", raw, statistics.inputs.to(raw), raw.conj())
    diagonal = statistics.queries.diagonal(dim1=1, dim2=2)
    asked = (diagonal[:, :pairs] + diagonal[:, pairs:]) * statistics.sensitivity[:, None]
    factors = asked.unflatten(0, (groups, -1)).sum(1).T.clamp(min=1e-30).sqrt()
    weighed = factors[:, :, None] * covariance * factors[:, None, :]
    return torch.linalg.eigh(weighed).eigenvectors.flip(-1), factors


def pooled_basis(
    weights: AttentionWeights, statistics: LayerStatistics
) -> tuple[Complex128[Tensor, "pairs groups groups"], Float64[Tensor, "pairs groups"]]:
    """RoRoPE (TransMLA, arXiv 2502.07864 section 4.2): a real rotation of the groups for each
    frequency, by the second moments of real and imaginary parts together.
    """
    pairs = len(weights.frequencies)
    real, imaginary = weights.k[:, :pairs], weights.k[:, pairs:]
    moments = sum(
        torch.einsum("glx,xy,hly->lgh", part, statistics.covariance, part)
        for part in (real, imaginary)
    )
    assert isinstance(moments, Tensor)
    unitary = torch.linalg.eigh(moments).eigenvectors.flip(-1)
    return unitary.to(torch.complex128), moments.new_ones(unitary.shape[:2])


def own_basis(
    weights: AttentionWeights, statistics: LayerStatistics
) -> tuple[Complex128[Tensor, "pairs groups groups"], Float64[Tensor, "pairs groups"]]:
    """Every group for itself (MHA2MLA, arXiv 2502.14837)."""
    pairs, groups = len(weights.frequencies), len(weights.k)
    eye = torch.eye(groups, dtype=torch.complex128).expand(pairs, groups, groups)
    return eye, torch.ones(pairs, groups, dtype=torch.float64)


def _real(parts: Tensor) -> Tensor:
    """Complex rows as real parts, then imaginary ones, along the last dimension but one."""
    return torch.cat([parts.real, parts.imag], dim=-2)
