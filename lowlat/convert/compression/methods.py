"""Compression methods by name: the choice of RoPE components and the metric of the latent."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from lowlat.convert.compression.components import (
    ComponentBasis,
    Components,
    DecoupledKeys,
    Priority,
    components,
    identity_basis,
    pooled_basis,
    weighted_basis,
)
from lowlat.convert.compression.low_rank import (
    LatentTarget,
    balanced_target,
    plain_target,
    weighted_target,
)
from lowlat.convert.compression.statistics import AttentionWeights, LayerStatistics
from lowlat.utils.progress import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionMethod:
    """A way to compress GQA into MLA with a smaller KV cache."""

    basis: ComponentBasis
    """Basis of the components of keys."""
    priority: Priority
    """Which components keep RoPE first."""
    uses_mean_rotation: bool
    """Whether NoPE components are multiplied by their mean rotation."""
    target: Callable[[AttentionWeights, LayerStatistics, DecoupledKeys], LatentTarget]
    """Target of the low-rank factorisation."""
    rotary: Callable[[int, int, int], int] | None
    """Rotary channels for (head_dim, groups, budget); None: chosen by predicted error."""
    fits_output: bool
    """Whether W_O is fitted to the new heads by ridge regression."""
    allocates_by_sensitivity: bool
    """Whether measured sensitivities determine the ranks of each layer (`budget`)."""
    fold: int = 1
    """Neighbouring frequencies that `basis` treats as one (FreqFold, TransMLA)."""
    stride: int = 1
    """Distance, within a fold, of the frequencies of consecutive RoPE components."""
    folded: Callable[[int, int, int], list["CompressionMethod"]] | None = None
    """For (head_dim, groups, budget), variants with increasing folds to try."""

    def components(self, weights: AttentionWeights, statistics: LayerStatistics) -> Components:
        """The keys of a layer in the basis of this method."""
        return components(
            weights,
            statistics,
            self.basis,
            self.priority,
            uses_mean_rotation=self.uses_mean_rotation,
            stride=self.stride,
        )


def best_fold(
    methods: Sequence[CompressionMethod],
    perplexity: Callable[[CompressionMethod], float],
    task: Task,
) -> CompressionMethod:
    """The last of `methods`, by increasing fold, before perplexity stops falling (as TransMLA)."""
    best, least = methods[0], math.inf
    for method in methods:
        found = perplexity(method)
        if found >= least:
            break
        best, least = method, found
        task.advance(1)
    return best


def _by_error(statistics: LayerStatistics, error: Tensor) -> Tensor:
    """Errors relative to the residual stream, so that those of different layers can be added."""
    return error / statistics.residual


def _leading_first(
    statistics: LayerStatistics, error: Float64[Tensor, "folds components"]
) -> Float64[Tensor, "folds components"]:
    """The leading component of every fold before any second one."""
    return -torch.arange(error.shape[1], dtype=torch.float64).expand(error.shape)


def _by_norms(
    statistics: LayerStatistics, error: Float64[Tensor, "pairs groups"]
) -> Float64[Tensor, "pairs groups"]:
    """The same number of pairs in every group, those of largest |q| |k| (MHA2MLA's S_2-norm)."""
    groups = error.shape[1]
    norms = statistics.norms.unflatten(0, (groups, -1)).sum(1)
    return -norms.argsort(dim=1, descending=True, stable=True).argsort(dim=1).double().T


def _transmla_rotary(head_dim: int, groups: int, budget: int) -> int:
    """One key head, or half of one if it would exceed a third of the cache entry."""
    return head_dim if budget >= 3 * head_dim else head_dim // 4 * 2


def _transmla_folds(head_dim: int, groups: int, budget: int) -> list[CompressionMethod]:
    """TransMLA's FreqFold with increasing folds. The leading components of a fold get every
    stride-th of its frequencies: every second one if half of the frequencies are kept.
    """
    pairs, stride = head_dim // 2, head_dim // _transmla_rotary(head_dim, groups, budget)
    plain = METHODS["transmla"]
    folds = [stride << step for step in range(pairs.bit_length())]
    folded = [
        replace(plain, basis=partial(pooled_basis, fold=fold), fold=fold, stride=stride)
        for fold in folds
        if fold <= pairs and pairs % fold == 0
    ]
    return folded or [plain]


def _mha2mla_rotary(head_dim: int, groups: int, budget: int) -> int:
    """A quarter of every key head, less if that would exceed half of the cache entry."""
    pairs = head_dim // 8
    while pairs > 1 and 2 * pairs * groups > budget / 2:
        pairs //= 2
    return 2 * pairs * groups


METHODS = {
    "weighted": CompressionMethod(
        basis=weighted_basis,
        priority=_by_error,
        uses_mean_rotation=True,
        target=weighted_target,
        rotary=None,
        fits_output=True,
        allocates_by_sensitivity=True,
    ),
    "transmla": CompressionMethod(
        basis=pooled_basis,
        priority=_leading_first,
        uses_mean_rotation=False,
        target=balanced_target,
        rotary=_transmla_rotary,
        fits_output=False,
        allocates_by_sensitivity=False,
        folded=_transmla_folds,
    ),
    "mha2mla": CompressionMethod(
        basis=identity_basis,
        priority=_by_norms,
        uses_mean_rotation=False,
        target=plain_target,
        rotary=_mha2mla_rotary,
        fits_output=False,
        allocates_by_sensitivity=False,
    ),
}
"""weighted is lowlat's own method; the others are baselines that follow their papers. In MHA2MLA
every layer has its own frequencies, which needs the free layout; in the standard layout all layers
share those that are best on average.
"""
DEFAULT_METHOD = "weighted"
