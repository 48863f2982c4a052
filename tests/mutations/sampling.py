"""Mistakes in what the filters keep and in the draw."""

from .mutant import Mutant

TEST = "tests/unit/ops/test_sampling.py::"

SAMPLING = [
    Mutant(
        "sampling: the token that crosses top_p dropped",
        "ops/sampling.py",
        "weights[ranking[1:][is_enough[:-1]]] = 0.0",
        "weights[ranking[is_enough]] = 0.0",
        TEST + "test_top_p_keeps_the_shortest_prefix_that_reaches_it",
    ),
    Mutant(
        "sampling: one token more than reaches top_p",
        "ops/sampling.py",
        "reached >= top_p * reached[-1]",
        "reached > top_p * reached[-1]",
        TEST + "test_top_p_reached_exactly_is_reached",
    ),
    Mutant(
        "sampling: top_p of all tokens, not of those top_k left",
        "ops/sampling.py",
        "top_p * reached[-1]",
        "top_p * (scores - largest).div(temperature).exp().sum()",
        TEST + "test_top_p_counts_probabilities_renormalised_after_top_k",
    ),
    Mutant(
        "sampling: equal logits ranked in any order",
        "ops/sampling.py",
        "logits.sort(descending=True, stable=True).indices",
        "logits.flip(0).sort(descending=True, stable=True).indices.neg() + len(logits) - 1",
        TEST + "test_top_k_keeps_exactly_k_lowest_ids_first",
    ),
    Mutant(
        "sampling: min_p of the whole in place of the largest",
        "ops/sampling.py",
        "weights[weights < min_p] = 0.0",
        "weights[weights < min_p * weights.sum()] = 0.0",
        TEST + "test_min_p_is_relative_to_the_likeliest",
    ),
    Mutant(
        "sampling: filters before temperature",
        "ops/sampling.py",
        "weights = ((scores - largest) / temperature).exp()",
        "weights = (scores - largest).exp()",
        TEST + "test_temperature_is_applied_before_the_filters",
    ),
]
