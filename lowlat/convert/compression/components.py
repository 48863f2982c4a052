"""Decoupled RoPE for compressed keys: complex components, some of which keep their rotation.

A pair of channels that RoPE rotates together is one complex number. For each frequency the key
heads form a complex vector. A unitary change of its basis commutes with the rotation. In the new
basis each component becomes either a RoPE component, part of the shared rotary key k_R, or a NoPE
component, which loses its rotation and becomes part of the latent. TransMLA's FreqFold treats
neighbouring frequencies as one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Complex128, Float64, Int64
from torch import Tensor

from lowlat.convert.compression.statistics import AttentionWeights, LayerStatistics

ComponentBasis = Callable[[AttentionWeights, LayerStatistics], tuple[Tensor, Tensor]]
"""Returns the unitary matrix [folds, members, components] of each fold of frequencies, and factors
[folds, members]: keys are first multiplied by them, and queries divided. A member is one key head
at one frequency of the fold, ordered by frequency.
"""
Priority = Callable[[LayerStatistics, Tensor], Tensor]
"""Maps the NoPE error [folds, components] to priorities: the highest become RoPE components."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Components:
    """Keys and queries of one layer in a basis of components, by falling priority in each fold."""

    keys: Complex128[Tensor, "folds components inputs"]
    """Each component as a function of the input."""
    queries: Complex128[Tensor, "heads folds components head_dim"]
    """Each head's factor of the component (conjugated), as a function of the real query."""
    nope_error: Float64[Tensor, "folds components"]
    """Squared change of the attention output if the component loses its rotation."""
    priority: Float64[Tensor, "folds components"]
    """Components with the largest priority keep their rotation."""
    frequencies: Float64[Tensor, "folds components"]
    """Radians per position of each component as a RoPE component."""
    uses_mean_rotation: bool
    """Whether NoPE components are multiplied by their mean rotation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoupledKeys:
    """A layer's keys in two parts, as real channels: real parts, then imaginary ones."""

    rope: Float64[Tensor, "rope inputs"]
    """Channels of the RoPE components."""
    rope_queries: Float64[Tensor, "heads rope head_dim"]
    frequencies: Float64[Tensor, " pairs"]
    """Radians per position of each pair of RoPE channels."""
    nope: Float64[Tensor, "nope inputs"]
    """Channels of the NoPE components."""
    nope_queries: Float64[Tensor, "heads nope head_dim"]


def components(
    weights: AttentionWeights,
    statistics: LayerStatistics,
    basis: ComponentBasis,
    priority: Priority,
    *,
    uses_mean_rotation: bool,
    stride: int = 1,
) -> Components:
    """The keys of a layer in `basis`.

    uses_mean_rotation: multiply NoPE components by their mean rotation, which reduces their error
    from energy to energy * (1 - |mean|^2); only for folds of one frequency. stride: the components
    of a fold get every `stride`-th of its frequencies, the remaining ones the last frequency.
    """
    unitary, factors = basis(weights, statistics)
    pairs, folds = len(weights.frequencies), len(unitary)
    groups, heads = len(weights.k), len(weights.q)
    assert folds == pairs or not uses_mean_rotation
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
    demand = (diagonal[:, :pairs] + diagonal[:, pairs:]) * statistics.sensitivity[:, None]
    if uses_mean_rotation:
        demand = demand * (1 - statistics.rotation.abs().square())
    head_dim = 2 * pairs
    demand = demand.unflatten(1, fold)
    error = torch.einsum("hir,irhj->ij", demand, mixing.abs().square()) * energy / head_dim
    error = error * weights.magnitude**4
    priorities = priority(statistics, error)
    order = priorities.argsort(dim=1, descending=True, stable=True)
    positions = (torch.arange(error.shape[1]) * stride).clamp(max=fold[1] - 1)
    return Components(
        keys=keys.take_along_dim(order[:, :, None], dim=1),
        queries=queries.take_along_dim(order[None, :, :, None], dim=2),
        nope_error=error.take_along_dim(order, dim=1),
        priority=priorities.take_along_dim(order, dim=1),
        frequencies=weights.frequencies.unflatten(0, fold)[:, positions],
        uses_mean_rotation=uses_mean_rotation,
    )


def decouple(
    parts: Components,
    weights: AttentionWeights,
    statistics: LayerStatistics,
    rope: Int64[Tensor, " rope"],
) -> DecoupledKeys:
    """Decoupled keys with the RoPE components `rope`, numbered fold * components + component."""
    count = parts.keys.shape[1]
    keys = parts.keys.flatten(0, 1)
    queries = parts.queries.flatten(1, 2)
    is_nope = torch.ones(len(keys), dtype=torch.bool)
    is_nope[rope] = False
    nope_queries = queries[:, is_nope] * weights.magnitude**2
    if parts.uses_mean_rotation:
        mean = statistics.rotation.repeat_interleave(count, dim=1)
        nope_queries = nope_queries * mean[:, is_nope, None]
    return DecoupledKeys(
        rope=_real(keys[rope]),
        rope_queries=_real(queries[:, rope]),
        frequencies=parts.frequencies.flatten()[rope],
        nope=_real(keys[is_nope]),
        nope_queries=_real(nope_queries),
    )


def weighted_basis(
    weights: AttentionWeights, statistics: LayerStatistics
) -> tuple[Complex128[Tensor, "pairs groups groups"], Float64[Tensor, "pairs groups"]]:
    """Eigenvectors of the complex keys' covariance, with key heads weighted by query energy."""
    pairs, groups = len(weights.frequencies), len(weights.k)
    raw = torch.complex(weights.k[:, :pairs], weights.k[:, pairs:])
    covariance = torch.einsum("glx,xy,hly->lgh", raw, statistics.inputs.to(raw), raw.conj())
    diagonal = statistics.queries.diagonal(dim1=1, dim2=2)
    demand = (diagonal[:, :pairs] + diagonal[:, pairs:]) * statistics.sensitivity[:, None]
    factors = demand.unflatten(0, (groups, -1)).sum(1).T.clamp(min=1e-30).sqrt()
    weighted = factors[:, :, None] * covariance * factors[:, None, :]
    return torch.linalg.eigh(weighted).eigenvectors.flip(-1), factors


def pooled_basis(
    weights: AttentionWeights, statistics: LayerStatistics, *, fold: int = 1
) -> tuple[Complex128[Tensor, "folds members members"], Float64[Tensor, "folds members"]]:
    """RoRoPE (TransMLA, arXiv 2502.07864 section 4.2): a real rotation of the key heads for each
    frequency, by the second moments of real and imaginary parts together. FreqFold: one rotation
    of the key heads at all of `fold` neighbouring frequencies.
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
    """Reshape [groups, pairs, inputs] to [folds, members, inputs]."""
    return keys.unflatten(1, (folds, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def identity_basis(
    weights: AttentionWeights, statistics: LayerStatistics
) -> tuple[Complex128[Tensor, "pairs groups groups"], Float64[Tensor, "pairs groups"]]:
    """The identity: key heads are not mixed (MHA2MLA, arXiv 2502.14837)."""
    pairs, groups = len(weights.frequencies), len(weights.k)
    eye = torch.eye(groups, dtype=torch.complex128).expand(pairs, groups, groups)
    return eye, torch.ones(pairs, groups, dtype=torch.float64)


def _real(parts: Tensor) -> Tensor:
    """Complex rows as real parts, then imaginary ones, along the last dimension but one."""
    return torch.cat([parts.real, parts.imag], dim=-2)
