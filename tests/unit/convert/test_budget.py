"""How a cache budget is divided among layers: kept, and well spent."""

import re
from itertools import product

import pytest
import torch

from lowlat.convert.compression.budget import (
    NOPE_WEIGHT,
    STEP,
    PredictedError,
    entry_budget,
    per_layer_widths,
    uniform_widths,
)
from lowlat.utils.errors import UserError


def random_costs(seed: int) -> list[dict[int, PredictedError]]:
    generator = torch.Generator().manual_seed(seed)
    layers: list[dict[int, PredictedError]] = []
    for _ in range(3):
        size = float(torch.rand((), generator=generator)) * 10
        layers.append(
            {
                rotary: PredictedError(
                    nope=size * 2.0 ** (-rotary / 8),
                    latent=size
                    * torch.rand(49, generator=generator, dtype=torch.float64).cumsum(0).flip(0),
                )
                for rotary in (8, 16, 24)
            }
        )
    return layers


@pytest.mark.parametrize("seed", range(20))
def test_budgets_are_kept_and_well_spent(seed: int) -> None:
    layers, budget = random_costs(seed), 40
    choices = [
        (NOPE_WEIGHT * c.nope + float(c.latent[rank]), rotary + rank)
        for layer in layers
        for rotary, c in layer.items()
        for rank in range(STEP, 49, STEP)
    ]
    each = len(choices) // 3
    per_layer = [choices[i * each : (i + 1) * each] for i in range(3)]
    found = per_layer_widths(layers, budget)
    spent = sum(w.latent + w.rotary for w in found)
    cost = sum(layer[w.rotary].total(w.latent) for layer, w in zip(layers, found, strict=True))
    assert spent <= 3 * budget
    best_at_this_price = min(
        sum(c for c, _ in chosen)
        for chosen in product(*per_layer)
        if sum(width for _, width in chosen) <= spent
    )
    assert cost == pytest.approx(best_at_this_price)
    even = uniform_widths(layers, budget)
    assert even.latent + even.rotary == budget
    assert sum(layer[even.rotary].total(even.latent) for layer in layers) == pytest.approx(
        min(sum(layer[r].total(budget - r) for layer in layers) for r in (8, 16, 24))
    )


@pytest.mark.parametrize(
    ("share", "words"), [(0.0, "below 1"), (1.0, "below 1"), (0.1, "at least")]
)
def test_shares_out_of_reach(share: float, words: str) -> None:
    with pytest.raises(UserError, match=words):
        entry_budget(share, 96, least=16)


@pytest.mark.parametrize(
    ("row", "least"), [(20, 16), (44, 40), (96, 16), (128, 40), (192, 24), (192, 184), (8192, 16)]
)
def test_the_share_that_is_named_is_accepted(row: int, least: int) -> None:
    for share in (1e-5, 1.0):
        with pytest.raises(UserError) as caught:
            entry_budget(share, row, least)
        named = re.search(r"(?:keep|at least) (0\.\d+)", str(caught.value))
        assert named is not None and entry_budget(float(named[1]), row, least) == least


def test_rows_of_which_no_part_is_enough() -> None:
    with pytest.raises(UserError, match=r"of 16 channels .* 16 are needed; leave out --cache"):
        entry_budget(0.5, 16, least=16)
