"""Keys as complex components: which of them keep turning with position, which stand still.

A pair of channels that turns together is one complex number; for each frequency the groups' keys
form a vector, and any unitary change of basis of it commutes with the rotation. TransMLA folds
neighbouring frequencies into one such vector, as if they were the same. Owns the change of basis of
each recipe and what it costs a component to stand still.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Complex128, Float64, Int64
from torch import Tensor

from lowlat.convert.statistics import AttentionWeights, LayerStatistics

Basis = Callable[[AttentionWeights, LayerStatistics], tuple[Tensor, Tensor]]
"""The unitary [folds, members, components] of each fold of frequencies, and the factors [folds,
members] that keys are multiplied by before it (their queries are divided). Members are the groups,
place after place of the fold's frequencies.
"""
Priority = Callable[[LayerStatistics, Tensor], Tensor]
"""From the cost [folds, components] of standing still to which component should rather turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """Keys and queries of one layer in a basis of components; those of a fold in order of falling
    priority.
    """

    keys: Complex128[Tensor, "folds components inputs"]
    """Each component as a function of the input."""
    queries: Complex128[Tensor, "heads folds components head_dim"]
    """What a head's query multiplies it by (conjugated), as a function of the real query."""
    cost: Float64[Tensor, "folds components"]
    """Squared movement of the attention output if the component stands still."""
    priority: Float64[Tensor, "folds components"]
    """Those of largest priority turn."""
    frequencies: Float64[Tensor, "folds components"]
    """That each turns with if it turns."""


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
    stride: int = 1,
) -> Components:
    """The keys of a layer in `basis`.

    keeps_mean: components that stand still are multiplied by their mean rotation, which makes their
    cost energy * (1 - |mean|^2) instead of energy; for folds of one frequency. The components of a
    fold turn, in their order, with every `stride`-th of its frequencies, and with its last one
    where these are used up.
    """
    unitary, factors = basis(weights, statistics)
    pairs, folds = len(weights.frequencies), len(unitary)
    groups, heads = len(weights.k), len(weights.q)
    assert folds == pairs or not keeps_mean
    fold = (folds, pairs // folds)
    raw = folded(torch.complex(weights.k[:, :pairs], weights.k[:, pairs:]), folds)
    keys = torch.einsum("imj,im,imx->ijx", unitary.conj(), factors.to(raw), raw)
    per_group = heads // groups
    mixing = (unitary.conj() / factors[:, :, None]).unflatten(1, (-1, groups))
    mixing = mixing.repeat_interleave(per_group, dim=2)
    eye = torch.eye(2 * pairs, dtype=torch.float64)
    own = torch.complex(eye[:pairs], eye[pairs:]).unflatten(0, fold)
    queries = torch.einsum("irhj,ird->hijd", mixing, own)
    energy = torch.einsum("ijx,xy,ijy->ij", keys, statistics.inputs.to(keys), keys.conj()).real
    diagonal = statistics.queries.diagonal(dim1=1, dim2=2)
    asked = (diagonal[:, :pairs] + diagonal[:, pairs:]) * statistics.sensitivity[:, None]
    if keeps_mean:
        asked = asked * (1 - statistics.rotation.abs().square())
    head_dim = 2 * pairs
    asked = asked.unflatten(1, fold)
    cost = torch.einsum("hir,irhj->ij", asked, mixing.abs().square()) * energy / head_dim
    cost = cost * weights.magnitude**4
    wanted = priority(statistics, cost)
    order = wanted.argsort(dim=1, descending=True, stable=True)
    places = (torch.arange(cost.shape[1]) * stride).clamp(max=fold[1] - 1)
    return Components(
        keys=keys.take_along_dim(order[:, :, None], dim=1),
        queries=queries.take_along_dim(order[None, :, :, None], dim=2),
        cost=cost.take_along_dim(order, dim=1),
        priority=wanted.take_along_dim(order, dim=1),
        frequencies=weights.frequencies.unflatten(0, fold)[:, places],
    )


def split(
    parts: Components,
    weights: AttentionWeights,
    statistics: LayerStatistics,
    turning: Int64[Tensor, " turning"],
    *,
    keeps_mean: bool,
) -> Split:
    """`parts` with the components numbered `turning` (fold * components + component) rotary."""
    count = parts.keys.shape[1]
    keys = parts.keys.flatten(0, 1)
    queries = parts.queries.flatten(1, 2)
    stays = torch.ones(len(keys), dtype=torch.bool)
    stays[turning] = False
    static = queries[:, stays] * weights.magnitude**2
    if keeps_mean:
        mean = statistics.rotation.repeat_interleave(count, dim=1)
        static = static * mean[:, stays, None]
    return Split(
        rotary=_real(keys[turning]),
        rotary_queries=_real(queries[:, turning]),
        frequencies=parts.frequencies.flatten()[turning],
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
    weights: AttentionWeights, statistics: LayerStatistics, *, fold: int = 1
) -> tuple[Complex128[Tensor, "folds members members"], Float64[Tensor, "folds members"]]:
    """RoRoPE (TransMLA, arXiv 2502.07864 section 4.2): a real rotation of the groups for each
    frequency, by the second moments of real and imaginary parts together. FreqFold: one rotation
    for `fold` neighbouring frequencies, of the groups at all of them.
    """
    pairs = len(weights.frequencies)
    parts = (folded(part, pairs // fold) for part in weights.k.split(pairs, dim=1))
    moments = sum(
        torch.einsum("imx,xy,iny->imn", part, statistics.covariance, part) for part in parts
    )
    assert isinstance(moments, Tensor)
    unitary = torch.linalg.eigh(moments).eigenvectors.flip(-1)
    return unitary.to(torch.complex128), moments.new_ones(unitary.shape[:2])


def folded(keys: Tensor, folds: int) -> Tensor:
    """[groups, pairs, inputs] as [folds, members, inputs]."""
    return keys.unflatten(1, (folds, -1)).permute(1, 2, 0, 3).flatten(1, 2)


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
