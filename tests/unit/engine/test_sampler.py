"""The sampler: penalties by hand, distribution of the draws, independence of the batch."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.sampler import SampledToken, SequenceSampler, StepLogits, apply_penalties, ranked
from lowlat.ops.sampling import kept_weights

VOCAB = 11


def sample(logits: Tensor, samplers: list[SequenceSampler]) -> list[SampledToken | None]:
    """A token from every row."""
    rows = StepLogits(logits)
    return [rows.sample(row, sampler) for row, sampler in enumerate(samplers)]


def sampler(prompt: tuple[int, ...] = (), index: int = 0, **options: Any) -> SequenceSampler:
    return SequenceSampler(TokenSamplingParams(**options), prompt, index, VOCAB)


def chi_squared(counts: Counter[int], expected: dict[int, float]) -> float:
    """Pearson's statistic over the sum of counts; every drawn token must have an expectation."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    return sum((counts[t] - total * p) ** 2 / (total * p) for t, p in expected.items())


# Order of scores


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    """Regression: a tie broken by whatever a kernel finds first, wide rows included."""
    for vocab in (VOCAB, 4099, 131071):
        row = torch.zeros(1, vocab)
        row[0, [vocab - 2, 7, vocab - 3]] = 3.0
        found = sample(row, [SequenceSampler(TokenSamplingParams(), (), 0, vocab)])
        assert found[0] is not None and found[0].token == 7


def test_ranked_breaks_ties_by_id_and_includes_all_ties_of_the_last() -> None:
    scores = torch.tensor([1.0, 5.0, 2.0, 5.0, 2.0, 2.0])
    assert ranked(scores, 1).tolist() == [1, 3]
    assert ranked(scores, 3).tolist() == [1, 3, 2, 4, 5]
    assert ranked(scores, 99).tolist() == [1, 3, 2, 4, 5, 0]


# Penalties and bias


def test_penalties_by_hand() -> None:
    """Repetition divides positive, multiplies negative logits; the others count the output only."""
    logits = torch.tensor([2.0, -2.0, 1.0, -1.0, 0.5])
    seen = torch.tensor([True, True, False, False, True])
    counts = torch.tensor([0.0, 2.0, 0.0, 0.0, 1.0])
    params = TokenSamplingParams(
        repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5
    )
    # 2 / 2; -2 * 2 - 2 * 0.5 - 0.25; untouched; untouched; 0.5 / 2 - 0.5 - 0.25
    assert apply_penalties(logits, seen, counts, params).tolist() == [1.0, -5.25, 1.0, -1.0, -0.5]


def test_presence_and_frequency_ignore_the_prompt_and_repetition_does_not() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3], row[0, 5] = 1.0, 0.9
    cases: list[tuple[dict[str, Any], int]] = [
        ({"presence_penalty": 1.0}, 3),
        ({"frequency_penalty": 1.0}, 3),
        ({"repetition_penalty": 2.0}, 5),
    ]
    for options, expected in cases:
        one = sampler((3,), **options)
        (found,) = sample(row, [one])
        assert found is not None and found.token == expected
        one.record(3)
        (found,) = sample(row, [one])
        assert found is not None and found.token == 5


def test_frequency_grows_with_every_occurrence() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3] = 1.0
    one = sampler(frequency_penalty=0.4)
    tokens = []
    for _ in range(4):
        (found,) = sample(row, [one])
        assert found is not None
        tokens.append(found.token)
        one.record(found.token)
    assert tokens == [3, 3, 3, 0]


def test_logit_bias_moves_and_forbids() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 3] = 50.0
    (found,) = sample(row, [sampler(logit_bias={3: -100, 8: 1.0})])
    assert found is not None and found.token == 8
    (found,) = sample(row.double(), [sampler(logit_bias={3: -100, 8: 1.0})])
    assert found is not None and found.token == 8


def test_raw_logits_are_left_as_they_were() -> None:
    """Regression: penalties or bias written into the caller's row, seen by the next completion."""
    row = torch.randn(2, VOCAB)
    before = row.clone()
    options: dict[str, Any] = {
        "logit_bias": {1: 5.0},
        "repetition_penalty": 1.5,
        "temperature": 0.7,
    }
    sample(row, [sampler((1, 2), **options), sampler((3,), index=1, **options)])
    assert torch.equal(row, before)


# Draws


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}])
def test_draws_follow_the_filtered_distribution(options: dict[str, Any]) -> None:
    """Chi-squared over 4,000 draws; the 0.01 % point of 10 degrees of freedom is 35.6."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5
    params = TokenSamplingParams(temperature=0.8, seed=11, **options)
    one = SequenceSampler(params, (), 0, VOCAB)
    counts = Counter(one.sample(logits, 0).token for _ in range(4000))
    weights = kept_weights(logits, temperature=0.8, **options)
    shares = (weights / weights.sum()).tolist()
    expected = {token: share for token, share in enumerate(shares) if share > 0}
    assert chi_squared(counts, expected) < 40


def test_a_token_of_probability_0_is_never_drawn() -> None:
    logits = torch.full((VOCAB,), -math.inf)
    logits[4] = logits[9] = 0.0
    one = sampler(temperature=1.0, seed=1)
    assert {one.sample(logits, 4).token for _ in range(200)} == {4, 9}


@pytest.mark.parametrize(("number", "expected"), [(0.0, 4), (1.0 - 2.0**-53, 9)])
def test_the_extreme_random_numbers_draw_the_outermost_likely_tokens(
    number: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: 0.0 drawing a token of probability 0, or a number near 1 none at all."""
    logits = torch.full((VOCAB,), -math.inf)
    logits[4] = logits[7] = logits[9] = 0.3
    one = sampler(temperature=0.7)
    monkeypatch.setattr(one._random, "random", lambda: number)
    assert one.sample(logits, 4).token == expected


def test_a_seed_repeats_and_neighbouring_seeds_and_indices_differ() -> None:
    """Regression: seed + index, where completion 1 of seed 0 would repeat 0 of seed 1."""
    logits = torch.zeros(VOCAB)

    def draw(seed: int, index: int) -> list[int]:
        one = sampler(index=index, temperature=1.0, seed=seed)
        return [one.sample(logits, 0).token for _ in range(20)]

    assert draw(5, 0) == draw(5, 0)
    streams = [draw(seed, index) for seed in (-1, 0, 1, 1 << 32, 1 << 40) for index in range(3)]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_without_a_seed_requests_differ() -> None:
    logits = torch.zeros(VOCAB)
    streams = set()
    for _ in range(3):
        one = sampler(temperature=1.0)
        streams.add(tuple(one.sample(logits, 0).token for _ in range(30)))
    assert len(streams) == 3


def test_tokens_do_not_depend_on_the_batch() -> None:
    """Regression: one generator shared by the rows of a batch."""
    rows = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(5))
    options: list[dict[str, Any]] = [{"temperature": 1.0, "seed": i} for i in range(7)]
    options[2] = {}
    options[4] |= {"top_p": 0.7, "frequency_penalty": 0.5}
    together = [sampler(**option) for option in options]
    alone = [sampler(**option) for option in options]
    for _ in range(9):
        batch = sample(rows, together)
        single = [sample(rows[i : i + 1], [one])[0] for i, one in enumerate(alone)]
        assert batch == single


# Log-probabilities and faults


def test_logprobs_are_of_the_raw_distribution() -> None:
    """Regression: log-probabilities after temperature, penalties or filters."""
    probabilities = [0.05, 0.4, 0.25, 0.25, 0.05]
    row = torch.tensor([probabilities]).log()
    params = TokenSamplingParams(
        temperature=3.0, top_k=2, logprobs=3, logit_bias={1: -100.0}, presence_penalty=1.0, seed=0
    )
    (found,) = sample(row, [SequenceSampler(params, (0,), 0, 5)])
    assert found is not None and found.token in (2, 3)
    assert found.logprob == pytest.approx(math.log(0.25))
    assert [token for token, _ in found.top] == [1, 2, 3]
    assert [p for _, p in found.top] == pytest.approx([math.log(p) for p in (0.4, 0.25, 0.25)])


def test_logprobs_0_gives_the_chosen_token_only() -> None:
    (found,) = sample(torch.zeros(1, VOCAB), [sampler(logprobs=0)])
    assert found is not None and found.top == ()
    assert found.logprob == pytest.approx(-math.log(VOCAB))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_yield_no_token_and_spare_other_rows(bad: float) -> None:
    """Regression: NaN logits turned into token 0 silently."""
    rows = torch.zeros(3, VOCAB)
    rows[1, 6] = bad
    rows[2, 4] = 1.0
    first, second, third = sample(rows, [sampler(), sampler(), sampler()])
    assert first is not None and first.token == 0
    assert second is None
    assert third is not None and third.token == 4
