"""What temperature and filters keep, by hand and against sorting in Python; the draw among it."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.ops.sampling import draw, kept_weights


def kept(probabilities: list[float], **options: Any) -> set[int]:
    """Ids that survive the filters, for logits with these probabilities."""
    logits = torch.tensor(probabilities).log()
    return set(kept_weights(logits, temperature=1.0, **options).nonzero().flatten().tolist())


def test_top_k_keeps_exactly_k_lowest_ids_first() -> None:
    assert kept([0.2, 0.3, 0.2, 0.2, 0.1], top_k=2) == {0, 1}
    assert kept([0.2, 0.3, 0.2, 0.2, 0.1], top_k=1) == {1}
    assert kept([0.2, 0.3, 0.2, 0.2, 0.1], top_k=99) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.3, {3}), (0.45, {3, 1}), (0.75, {3, 1, 0}), (0.93, {3, 1, 0, 4}), (1.0, {0, 1, 2, 3, 4})],
)
def test_top_p_keeps_the_shortest_prefix_that_reaches_it(top_p: float, expected: set[int]) -> None:
    """Regression: dropping the token that crosses the border."""
    assert kept([0.15, 0.3, 0.05, 0.4, 0.1], top_p=top_p) == expected


def test_top_p_reached_exactly_is_reached() -> None:
    assert kept([0.25, 0.25, 0.25, 0.25], top_p=0.5) == {0, 1}


def test_top_p_counts_probabilities_renormalised_after_top_k() -> None:
    # After top-k: 0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85 = 0.47, 0.35, 0.18.
    assert kept([0.15, 0.3, 0.05, 0.4, 0.1], top_k=3, top_p=0.8) == {3, 1}
    assert kept([0.15, 0.3, 0.05, 0.4, 0.1], top_p=0.8) == {3, 1, 0}


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert kept([0.15, 0.3, 0.05, 0.4, 0.1], min_p=0.3) == {0, 1, 3}
    assert kept([0.15, 0.3, 0.05, 0.4, 0.1], min_p=0.3, top_p=0.6) == {1, 3}
    assert kept([0.15, 0.3, 0.05, 0.4, 0.1], min_p=0.8, top_k=4) == {3}


def test_temperature_is_applied_before_the_filters() -> None:
    """At temperature 0.5 probabilities 0.5, 0.3, 0.2 become 25, 9, 4 of 38."""
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    weights = kept_weights(logits, temperature=0.5, top_p=0.8)
    assert (weights / weights.sum()).tolist() == pytest.approx([25 / 34, 9 / 34, 0])


@settings(deadline=None)
@given(
    st.lists(st.integers(-40, 40), min_size=1, max_size=700),
    st.sampled_from([0, 1, 3, 300]),
    st.sampled_from([0.1, 0.6, 0.999, 1.0]),
    st.sampled_from([0.0, 0.05, 1.0]),
)
def test_filters_match_a_plain_definition(
    values: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    """Against sorting everything in Python, with many ties."""
    logits = torch.tensor(values, dtype=torch.float32) / 8
    weights = kept_weights(logits, temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    order = order[:top_k] if top_k else order
    total = sum(math.exp(values[i] / 8) for i in order)
    expected: set[int] = set()
    reached = 0.0
    for i in order:
        if top_p == 1.0 or reached < top_p * total * (1 - 1e-12) or not expected:
            expected.add(i)
            reached += math.exp(values[i] / 8)
    best = max(values)
    if min_p > 0:
        expected = {i for i in expected if math.exp((values[i] - best) / 8) >= min_p * (1 - 1e-9)}
    assert set(weights.nonzero().flatten().tolist()) == expected
    assert float(weights.max()) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_draw_takes_the_kept_tokens_by_id(dtype: torch.dtype) -> None:
    """Kept: 0.3, 0.4 and 0.15 at ids 1, 3 and 0, in shares 3, 8 and 6 of 17 by id."""
    logits = torch.tensor([0.15, 0.3, 0.05, 0.4, 0.1], dtype=dtype).log()
    shares = [(0, 3), (1, 6), (3, 8)]
    first = 0
    for token, share in shares:
        for place in (first + 0.01, first + share - 0.01):
            assert draw(logits, place / 17, temperature=1.0, top_k=3) == token
        first += share


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("row", [[-math.inf, -math.inf], [0.0, math.inf]])
def test_a_row_without_a_finite_largest_logit_is_an_error(
    row: list[float], dtype: torch.dtype
) -> None:
    """Regression: a token made of NaN, say where a grammar forbids every token."""
    with pytest.raises(ValueError, match="the largest logit is not finite"):
        draw(torch.tensor(row, dtype=dtype), 0.5, temperature=1.0)
