"""Recipes of compression by name: whose components turn, what the latent is fitted to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from lowlat.convert.components import (
    Basis,
    Components,
    Priority,
    Split,
    components,
    own_basis,
    pooled_basis,
    weighted_basis,
)
from lowlat.convert.factors import Target, balanced_target, plain_target, weighted_target
from lowlat.convert.statistics import AttentionWeights, LayerStatistics
from lowlat.utils.progress import Task


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One way to compress."""

    basis: Basis
    """Of the components of keys."""
    priority: Priority
    """Which components turn."""
    keeps_mean: bool
    """Components that stand still are multiplied by their mean rotation."""
    target: Callable[[AttentionWeights, LayerStatistics, Split], Target]
    """What the latent is fitted to."""
    rotary: Callable[[int, int, int], int] | None
    """Rotary channels for (head_dim, groups, budget); None has them chosen by cost."""
    refits_output: bool
    """W_O is fitted again behind the new heads (`convert.refit`)."""
    divides_budget: bool
    """In the free layout layers have widths of their own, by what their errors cost
    (`convert.prices`); otherwise all have the same there, too.
    """
    fold: int = 1
    """Neighbouring frequencies that `basis` takes for one."""
    stride: int = 1
    """Of the frequencies of a fold, from one turning component to the next."""
    folded: Callable[[int, int, int], list["Recipe"]] | None = None
    """For (head_dim, groups, budget), itself with frequencies folded more and more, to try."""


def way_components(
    way: Recipe, weights: AttentionWeights, statistics: LayerStatistics
) -> Components:
    """The keys of a layer as `way` takes them apart."""
    return components(
        weights,
        statistics,
        way.basis,
        way.priority,
        keeps_mean=way.keeps_mean,
        stride=way.stride,
    )


def best_folded(
    ways: Sequence[Recipe], perplexity: Callable[[Recipe], float], task: Task
) -> Recipe:
    """Of `ways`, which fold more and more, the last before `perplexity` stops falling, as TransMLA
    tries them.
    """
    best, least = ways[0], math.inf
    for way in ways:
        found = perplexity(way)
        if found >= least:
            break
        best, least = way, found
        task.advance(1)
    return best


def _by_cost(statistics: LayerStatistics, cost: Tensor) -> Tensor:
    """Relative to the residual stream, so that those of different layers can be added."""
    return cost / statistics.residual


def _leading_first(
    statistics: LayerStatistics, cost: Float64[Tensor, "folds components"]
) -> Float64[Tensor, "folds components"]:
    """The leading component of every fold before any second one."""
    return -torch.arange(cost.shape[1], dtype=torch.float64).expand(cost.shape)


def _by_norms(
    statistics: LayerStatistics, cost: Float64[Tensor, "pairs groups"]
) -> Float64[Tensor, "pairs groups"]:
    """The same number of pairs in every group, those of largest |q| |k| (MHA2MLA's S_2-norm)."""
    groups = cost.shape[1]
    norms = statistics.norms.unflatten(0, (groups, -1)).sum(1)
    return -norms.argsort(dim=1, descending=True, stable=True).argsort(dim=1).double().T


def _transmla_rotary(head_dim: int, groups: int, budget: int) -> int:
    """One key head, half of one where it would be more than a third of the row."""
    return head_dim if budget >= 3 * head_dim else head_dim // 4 * 2


def _transmla_folds(head_dim: int, groups: int, budget: int) -> list[Recipe]:
    """FreqFold: the leading components of a fold turn with every stride-th of its frequencies,
    where half of the frequencies are kept with every second.
    """
    pairs, stride = head_dim // 2, head_dim // _transmla_rotary(head_dim, groups, budget)
    plain = RECIPES["transmla"]
    folds = [stride << step for step in range(pairs.bit_length())]
    folded = [
        replace(plain, basis=partial(pooled_basis, fold=fold), fold=fold, stride=stride)
        for fold in folds
        if fold <= pairs and pairs % fold == 0
    ]
    return folded or [plain]


def _mha2mla_rotary(head_dim: int, groups: int, budget: int) -> int:
    """A quarter of every key head, less where it would be more than half of the row."""
    pairs = head_dim // 8
    while pairs > 1 and 2 * pairs * groups > budget / 2:
        pairs //= 2
    return 2 * pairs * groups


RECIPES = {
    "weighted": Recipe(
        basis=weighted_basis,
        priority=_by_cost,
        keeps_mean=True,
        target=weighted_target,
        rotary=None,
        refits_output=True,
        divides_budget=True,
    ),
    "transmla": Recipe(
        basis=pooled_basis,
        priority=_leading_first,
        keeps_mean=False,
        target=balanced_target,
        rotary=_transmla_rotary,
        refits_output=False,
        divides_budget=False,
        folded=_transmla_folds,
    ),
    "mha2mla": Recipe(
        basis=own_basis,
        priority=_by_norms,
        keeps_mean=False,
        target=plain_target,
        rotary=_mha2mla_rotary,
        refits_output=False,
        divides_budget=False,
    ),
}
"""weighted is lowlat's own; the others are baselines, as their papers have them. MHA2MLA's layers
turn with frequencies of their own, which needs the free layout; in the standard one all share those
that are best on average.
"""
