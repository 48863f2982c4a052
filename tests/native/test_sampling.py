"""Native token sampling against lowlat.ops.sampling, at every level: which tokens are kept, in what
shares, and the same token whatever the level.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowlat.ops.sampling import kept_weights

from . import kernels
from .inputs import LEVELS, every_level, needs_native, seeds

pytestmark = needs_native

PIECE = 8192
"""Logits the kernel takes at a time."""
KINDS = ("normal", "peaked", "wide", "huge", "alike", "few", "equal", "masked", "zeros")
sizes = st.one_of(
    st.integers(1, 40),
    st.integers(PIECE - 9, PIECE + 9),
    st.sampled_from([2 * PIECE, 2 * PIECE + 1, 30_011]),
)
options = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1e-4, 0.6, 1.0, 100.0]),
        "top_k": st.sampled_from([0, 1, 3, 100, PIECE, 1 << 20]),
        "top_p": st.sampled_from([1e-6, 0.1, 0.6, 0.95, 1 - 1e-6, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05, 1.0]),
    }
)


def draw_logits(size: int, kind: str, seed: int) -> Tensor:
    """`alike`: logits that differ in their last bits; `few`: many ties; `zeros`: of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator)
    match kind:
        case "peaked":
            return 4 * x
        case "wide":
            return x * torch.exp2(torch.randint(-30, 10, (size,), generator=generator))
        case "huge":
            return 3e37 * x
        case "alike":
            return 7 + 1e-6 * x
        case "few":
            return (2 * x).round() / 4
        case "equal":
            return torch.full((size,), -3.3)
        case "masked":
            x[torch.rand(size, generator=generator) < 0.9] = -math.inf
            x[seed % size] = 0.5
            return x
        case "zeros":
            return torch.zeros(size).copysign(x)
    return x


def is_clear(logits: Tensor, options: dict[str, Any]) -> bool:
    """Whether rounding cannot decide what is kept: no sum that ends a filter is next to it."""
    settings = {"temperature": options["temperature"], "top_k": options["top_k"]}
    weights = kept_weights(logits, **settings)
    reached = weights.sort(descending=True).values.cumsum(0)
    near_p = (reached / reached[-1] / options["top_p"] - 1).abs() < 1e-11
    near_min = (weights / max(options["min_p"], 1e-9) - 1).abs() < 1e-11
    return not (
        (options["top_p"] < 1 and bool(near_p.any()))
        or (0 < options["min_p"] < 1 and bool(near_min.any()))
    )


@every_level
@settings(max_examples=100, deadline=None)
@given(size=sizes, kind=st.sampled_from(KINDS), seed=seeds, options=options)
def test_draws_are_those_of_the_definition(
    level: str, size: int, kind: str, seed: int, options: dict[str, Any]
) -> None:
    """Just within both ends of a token's share of the numbers, that token is drawn."""
    logits = draw_logits(size, kind, seed)
    assume(is_clear(logits, options))
    weights = kept_weights(logits, **options)
    ends = weights.cumsum(0) / weights.sum()
    shares = weights / weights.sum()
    wide_enough = (shares > 1e-8).nonzero().flatten()
    places = torch.linspace(0, len(wide_enough) - 1, 20).round().long().unique()
    for token in wide_enough[places].tolist():
        end, share = float(ends[token]), float(shares[token])
        for number in (end - 0.999 * share, end - 0.5 * share, end - 0.001 * share):
            assert kernels.draw(logits, number, **options, level=level) == token
    for number in (0.0, 1 - 2.0**-53):
        assert weights[kernels.draw(logits, number, **options, level=level)] > 0


@every_level
@pytest.mark.parametrize("size", [1, 10, 3 * PIECE])
@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.5, 0.7])
def test_ties_at_the_border_go_to_the_lowest_ids(level: str, size: int, top_p: float) -> None:
    """Equal weights are 1 and their sums exact: the number kept is, too."""
    logits = torch.full((size,), 2.5)
    last = int(kept_weights(logits, temperature=0.7, top_p=top_p).nonzero().max())
    options: dict[str, Any] = {"temperature": 0.7, "level": level}
    assert kernels.draw(logits, 1 - 2.0**-53, top_p=top_p, **options) == last
    assert kernels.draw(logits, 1 - 2.0**-53, top_k=last + 1, **options) == last


@every_level
def test_the_border_between_ties_in_another_piece(level: str) -> None:
    """Of 2 larger logits and 20,000 equal ones the first 10,000 are kept."""
    logits = torch.zeros(20_002)
    logits[[50, 20_000]] = 1.0
    total = 10_000 + 2 * math.e
    last = (9_999.5 + math.e) / total  # in the middle of the last of the 10,000, after id 50
    for number, token in ((0.0, 0), (last, 10_000), (1 - 2.0**-53, 20_000)):
        found = kernels.draw(logits, number, temperature=1.0, top_k=10_002, level=level)
        assert found == token


@every_level
def test_tokens_of_weight_0_are_never_drawn(level: str) -> None:
    logits = torch.full((2 * PIECE + 5,), -math.inf)
    logits[[4, 7, PIECE + 9]] = 0.3
    logits[[2, PIECE + 20]] = -1e5
    for options in ({}, {"top_p": 1 - 2.0**-53}, {"top_k": PIECE}, {"min_p": 0.1}):
        for number, token in ((0.0, 4), (0.5, 7), (1 - 2.0**-53, PIECE + 9)):
            found = kernels.draw(logits, number, temperature=0.7, **options, level=level)
            assert found == token


@pytest.mark.parametrize("kind", ["normal", "peaked", "few", "masked"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 900, "top_p": 0.9}, {"top_p": 0.97}])
def test_tokens_do_not_depend_on_the_level(kind: str, filters: dict[str, Any]) -> None:
    """At the very ends of shares, where the last bits of all sums decide."""
    logits = draw_logits(5 * PIECE + 77, kind, 5)
    weights = kept_weights(logits, temperature=0.6, **filters)
    ends = (weights.cumsum(0) / weights.sum())[weights > 0]
    numbers = ends[:: max(1, len(ends) // 60)].clamp(max=1 - 2.0**-53).tolist()
    found = set()
    for level in LEVELS:
        given = {"temperature": 0.6, "level": level, **filters}
        found.add(tuple(kernels.draw(logits, number, **given) for number in numbers))
    assert len(found) == 1


@every_level
def test_rows_of_a_matrix_and_columns(level: str) -> None:
    x = torch.randn(30, 50)
    for logits in (x[3], x[:, 7]):
        expected = kernels.draw(logits.clone(), 0.4, temperature=1.0, level=level)
        assert kernels.draw(logits, 0.4, temperature=1.0, level=level) == expected


@every_level
def test_the_largest_logit_must_be_finite(level: str) -> None:
    for largest in (-math.inf, math.inf):
        logits = torch.tensor([-math.inf, largest])
        with pytest.raises(ValueError, match="the largest logit is not finite"):
            kernels.draw(logits, 0.5, temperature=1.0, level=level)


@every_level
@pytest.mark.parametrize(
    ("size", "place"), [(1, 0), (5, 4), (40, 17), (20_000, 19_999), (20_000, 3)]
)
def test_no_logit_may_be_nan(level: str, size: int, place: int) -> None:
    """Regression: a maximum that passes over NaN, so that the draw is from garbage."""
    logits = torch.randn(size)
    logits[place] = math.nan
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}):
        with pytest.raises(ValueError, match="the largest logit is not finite"):
            kernels.draw(logits, 0.5, temperature=1.0, level=level, **filters)


@pytest.mark.parametrize(
    "wrong",
    [
        {"number": 1.0},
        {"number": -0.1},
        {"number": math.nan},
        {"temperature": 0.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"logits": torch.empty(0)},
    ],
    ids=str,
)
def test_options_out_of_range_are_errors(wrong: dict[str, Any]) -> None:
    right: dict[str, Any] = {"logits": torch.zeros(3), "number": 0.5, "temperature": 1.0}
    with pytest.raises(ValueError, match="sampling options are out of range"):
        kernels.draw(**(right | wrong))
