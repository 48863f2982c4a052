"""How a cache budget is divided: rotary and latent channels of every layer."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from lowlat.utils.errors import UserError

STEP = 8
"""Channels come in multiples of this, so that rows of a cache lie well in memory."""
STILL_SHARE = 0.4
"""Of the predicted cost of components that stand still, where its price is not known. Errors of
different keys are taken for independent, but where keys stand still their errors change slowly with
distance and the softmax takes out what they have in common.
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

    def of(self, latent: int, price: "Price | None" = None) -> float:
        """All together at a price, or as it is predicted without measuring one."""
        price = price or Price(still=STILL_SHARE, latent=1.0)
        return price.still * self.still + price.latent * self.dropped(latent)

    def dropped(self, latent: int) -> float:
        """Of so many channels of the latent."""
        return float(self.latent[min(latent, len(self.latent) - 1)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Price:
    """What a unit of a layer's predicted costs (`Costs`) is worth at the end of the model."""

    still: float
    latent: float


LayerCosts = Mapping[int, Costs]
"""By rotary channels."""


def row_budget(share: float, row: int, least: int, why: str = "") -> int:
    """Channels a row may have on average if `share` of `row` is kept: the nearest multiple of STEP,
    so that 0.33 is a third. why: what needs `least`, a multiple of STEP, for the message.

    Raises UserError where that is fewer than `least` or no saving.
    """
    if least >= row:
        raise UserError(
            f"--cache: of {row} channels a token and layer, {least} are needed{why}; leave out "
            "--cache, and the conversion is exact"
        )
    kept = _kept(share, row) if 0 < share < 1 else row
    if kept >= row:
        raise UserError(
            f"--cache {share:g}: give the share of the cache to keep, below 1 and at least "
            f"{_least_share(row, least)}; without --cache the conversion is exact"
        )
    if kept < least:
        raise UserError(
            f"--cache {share:g} leaves {kept} of {row} channels a token and layer, at least "
            f"{least} are needed{why}; keep {_least_share(row, least)} or more"
        )
    return kept


def _kept(share: float, row: int) -> int:
    return round(share * row / STEP) * STEP


def _least_share(row: int, least: int) -> str:
    """What keeps `least` of `row`, rounded up to as many digits as say no more than that."""
    for digits in itertools.count(2):
        share = -(-least * 10**digits // row) / 10**digits
        if _kept(share, row) == least:
            return f"{share:.{digits}f}"
    raise AssertionError


def even_widths(layers: Sequence[LayerCosts], budget: int) -> Widths:
    """The same widths for all layers that cost least together."""
    choices = [
        (sum(layer[rotary].of(budget - rotary) for layer in layers), rotary)
        for rotary in layers[0]
        if budget - rotary >= STEP
    ]
    _, rotary = min(choices)
    return Widths(latent=budget - rotary, rotary=rotary)


def free_widths(
    layers: Sequence[LayerCosts], budget: int, prices: Sequence[Price] | None = None
) -> list[Widths]:
    """Widths by layer, `budget` channels a layer on average at most, of least total cost.

    A channel costs the same in all layers (a Lagrange multiplier), which is found by bisection.
    """
    total = budget * len(layers)
    pairs = zip(layers, prices or [None] * len(layers), strict=True)
    choices = [_choices(costs, price) for costs, price in pairs]
    low, high = 1e-20, 1e20
    found = [each.cheapest(high) for each in choices]
    for _ in range(200):
        channel = (low * high) ** 0.5
        widths = [each.cheapest(channel) for each in choices]
        if sum(w.latent + w.rotary for w in widths) > total:
            low = channel
        else:
            high, found = channel, widths
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class _Choices:
    """All widths a layer may have."""

    widths: list[Widths]
    costs: Float64[Tensor, " choices"]
    channels: Float64[Tensor, " choices"]

    def cheapest(self, channel: float) -> Widths:
        """Where a channel costs so much."""
        return self.widths[int((self.costs + channel * self.channels).argmin())]


def _choices(layer: LayerCosts, price: Price | None) -> _Choices:
    widths: list[Widths] = []
    costs: list[float] = []
    for rotary, own in layer.items():
        for latent in range(STEP, max(len(own.latent), STEP + 1), STEP):
            widths.append(Widths(latent=latent, rotary=rotary))
            costs.append(own.of(latent, price))
    return _Choices(
        widths=widths,
        costs=torch.tensor(costs, dtype=torch.float64),
        channels=torch.tensor([each.latent + each.rotary for each in widths], dtype=torch.float64),
    )
