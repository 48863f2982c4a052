"""KV cache budget: how latent and rotary channels are allocated to the layers (rank allocation).

In the standard layout all layers have the same widths. In the free layout a Lagrange multiplier
minimises the total predicted error under a limit on the average width.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lowlat.utils.errors import UserError

STEP = 8
"""Widths are multiples of this, so that cache entries are aligned."""
NOPE_WEIGHT = 0.4
"""Weight of the predicted error of NoPE components if no sensitivity is measured. The prediction
treats errors of different keys as independent. Those of NoPE components change slowly with
distance, and the softmax cancels their common part.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class EntryWidths:
    """Channels of a layer's KV cache entry."""

    latent: int
    """Channels of c_t."""
    rotary: int
    """Channels of k_R."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivity:
    """Divergence of the model's predictions per unit of a layer's error, in nats per token."""

    nope: float
    latent: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictedError:
    """A layer's squared error relative to the residual stream, for one rotary width."""

    nope: float
    """Error of the components that lose their rotation."""
    latent: Float64[Tensor, " ranks"]
    """Error of a latent of 0, 1, ... channels."""

    def total(self, latent: int, sensitivity: Sensitivity | None = None) -> float:
        """Error with `latent` channels, weighted by `sensitivity` if it is measured."""
        weights = sensitivity or Sensitivity(nope=NOPE_WEIGHT, latent=1.0)
        return weights.nope * self.nope + weights.latent * self.truncation(latent)

    def truncation(self, latent: int) -> float:
        """Error of a latent of `latent` channels."""
        return float(self.latent[min(latent, len(self.latent) - 1)])


ErrorsByRotary = Mapping[int, PredictedError]
"""A layer's predicted errors by number of rotary channels."""


def entry_budget(share: float, entry: int, least: int, why: str = "") -> int:
    """Average channels of a compressed cache entry: `share` of `entry` channels, rounded to a
    multiple of STEP, so that 0.33 is a third.

    least: minimum budget, a multiple of STEP. why: its reason, for the error message. Raises
    UserError if the budget is below `least` or saves nothing.
    """
    if least >= entry:
        raise UserError(
            f"--cache: of {entry} channels per token and layer, {least} are needed{why}; leave out "
            "--cache for an exact conversion"
        )
    kept = _kept(share, entry) if 0 < share < 1 else entry
    if kept >= entry:
        raise UserError(
            f"--cache {share:g}: give the share of the cache to keep, below 1 and at least "
            f"{_least_share(entry, least)}; without --cache the conversion is exact"
        )
    if kept < least:
        raise UserError(
            f"--cache {share:g} leaves {kept} of {entry} channels per token and layer, at least "
            f"{least} are needed{why}; keep {_least_share(entry, least)} or more"
        )
    return kept


def _kept(share: float, entry: int) -> int:
    return round(share * entry / STEP) * STEP


def _least_share(entry: int, least: int) -> str:
    """The smallest share whose budget is `least` of `entry` channels, with as few digits as
    possible.
    """
    for digits in itertools.count(2):
        share = -(-least * 10**digits // entry) / 10**digits
        if _kept(share, entry) == least:
            return f"{share:.{digits}f}"
    raise AssertionError


def uniform_widths(layers: Sequence[ErrorsByRotary], budget: int) -> EntryWidths:
    """The widths of least total error, equal in all layers."""
    choices = [
        (sum(layer[rotary].total(budget - rotary) for layer in layers), rotary)
        for rotary in layers[0]
        if budget - rotary >= STEP
    ]
    _, rotary = min(choices)
    return EntryWidths(latent=budget - rotary, rotary=rotary)


def per_layer_widths(
    layers: Sequence[ErrorsByRotary],
    budget: int,
    sensitivities: Sequence[Sensitivity] | None = None,
) -> list[EntryWidths]:
    """Widths by layer of least total error, with at most `budget` channels per layer on average.

    A Lagrange multiplier, the cost of a channel, is found by bisection.
    """
    limit = budget * len(layers)
    pairs = zip(layers, sensitivities or [None] * len(layers), strict=True)
    choices = [_choices(errors, sensitivity) for errors, sensitivity in pairs]

    def best(multiplier: float) -> list[EntryWidths]:
        return [
            widths[int((errors + multiplier * channels).argmin())]
            for widths, errors, channels in choices
        ]

    low, high = 1e-20, 1e20
    found = best(high)
    for _ in range(200):
        multiplier = (low * high) ** 0.5
        widths = best(multiplier)
        if sum(w.latent + w.rotary for w in widths) > limit:
            low = multiplier
        else:
            high, found = multiplier, widths
    return found


def _choices(
    layer: ErrorsByRotary, sensitivity: Sensitivity | None
) -> tuple[list[EntryWidths], Float64[Tensor, " choices"], Float64[Tensor, " choices"]]:
    """All widths a layer may have, with their errors and channels."""
    widths: list[EntryWidths] = []
    errors: list[float] = []
    for rotary, predicted in layer.items():
        for latent in range(STEP, max(len(predicted.latent), STEP + 1), STEP):
            widths.append(EntryWidths(latent=latent, rotary=rotary))
            errors.append(predicted.total(latent, sensitivity))
    channels = torch.tensor([each.latent + each.rotary for each in widths], dtype=torch.float64)
    return widths, torch.tensor(errors, dtype=torch.float64), channels
