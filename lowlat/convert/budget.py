"""How a cache budget is divided: rotary and latent channels of every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lowlat.utils.errors import UserError

STEP = 8
"""Channels come in multiples of this, so that rows of a cache lie well in memory."""
STILL_SHARE = 0.2
"""Of the predicted cost of components that stand still. Errors of different keys are taken for
independent, but where keys stand still their errors change slowly with distance and the softmax
takes out what they have in common; measured on SmolLM2-135M, where any value from 0.2 to 0.5 leads
to the same loss.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Widths:
    """A layer's cache row."""

    latent: int
    """Channels of c_t."""
    rotary: int
    """Channels of k_R."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """What a layer costs with a certain number of rotary channels."""

    still: float
    """Of the components that do not turn."""
    latent: Float64[Tensor, " ranks"]
    """Of keeping 0, 1, ... channels of the latent."""

    def of(self, latent: int) -> float:
        """Predicted cost."""
        return STILL_SHARE * self.still + float(self.latent[min(latent, len(self.latent) - 1)])


LayerCosts = Mapping[int, Costs]
"""By rotary channels."""


def row_budget(share: float, row: int, least: int) -> int:
    """Channels a row may have on average if `share` of `row` is kept: the nearest multiple of STEP,
    so that 0.33 is a third.

    Raises UserError where that is fewer than `least` or no saving.
    """
    kept = round(share * row / STEP) * STEP if 0 < share < 1 else row
    if kept >= row:
        raise UserError(
            f"--cache {share:g}: give the share of the cache to keep, below 1 and at least "
            f"{least / row:.2f}; without --cache the conversion is exact"
        )
    if kept < least:
        raise UserError(
            f"--cache {share:g} leaves {kept} of {row} channels a token and layer, at least "
            f"{least} are needed; keep {least / row:.2f} or more"
        )
    return kept


def even_widths(layers: Sequence[LayerCosts], budget: int) -> Widths:
    """The same widths for all layers that cost least together."""
    choices = [
        (sum(layer[rotary].of(budget - rotary) for layer in layers), rotary)
        for rotary in layers[0]
        if budget - rotary >= STEP
    ]
    _, rotary = min(choices)
    return Widths(latent=budget - rotary, rotary=rotary)


def free_widths(layers: Sequence[LayerCosts], budget: int) -> list[Widths]:
    """Widths by layer, `budget` channels a layer on average at most, of least total cost.

    One price per channel holds for all layers (a Lagrange multiplier); it is found by bisection.
    """
    total = budget * len(layers)
    low, high = 1e-20, 1e20
    found = [_cheapest(layer, high) for layer in layers]
    for _ in range(200):
        price = (low * high) ** 0.5
        widths = [_cheapest(layer, price) for layer in layers]
        if sum(w.latent + w.rotary for w in widths) > total:
            low = price
        else:
            high, found = price, widths
    return found


def _cheapest(layer: LayerCosts, price: float) -> Widths:
    best: tuple[float, int, int] | None = None
    for rotary, costs in layer.items():
        ranks = torch.arange(STEP, max(len(costs.latent), STEP + 1), STEP)
        kept = costs.latent[ranks.clamp(max=len(costs.latent) - 1)]
        totals = STILL_SHARE * costs.still + kept + price * (rotary + ranks)
        place = int(totals.argmin())
        choice = (float(totals[place]), rotary, int(ranks[place]))
        best = choice if best is None else min(best, choice)
    assert best is not None
    return Widths(latent=best[2], rotary=best[1])
