"""Number of draft tokens: cost of steps and of drafting, acceptance rates."""

import pytest

from lowlat.engine.draft_policy import MAX_DRAFT_TOKENS, PRIOR, RETRY, DraftPolicy, StepCost
from lowlat.engine.params import TokenSamplingParams
from lowlat.engine.request import Request, RequestOptions, Sequence


def sequence() -> Sequence:
    params = TokenSamplingParams()
    request = Request(
        id=0,
        prompt=(1,),
        params=params,
        options=RequestOptions(),
        max_outputs=50,
        arrived_at=0.0,
    )
    return Sequence(request=request, index=0, tokens=[1, 2])


def test_cost_of_a_step_is_learnt() -> None:
    cost = StepCost(share=0.5)
    for count in (1, 2, 5, 9, 1, 3):
        cost.add(count, 0.020 + 0.003 * count)
    assert cost.estimate() == pytest.approx((0.020, 0.003))


def test_drafts_are_made_where_they_pay() -> None:
    choice, one = DraftPolicy(), sequence()
    for _ in range(9):
        choice.stepped(1, 1.0)
        choice.stepped(5, 1.1)
        choice.verified(one, 4, 4)
    assert choice.choose({one: 50}) == {one: MAX_DRAFT_TOKENS}
    assert choice.choose({one: 2}) == {one: 2}
    assert choice.choose({one: 0}) == {one: 0}


def test_drafts_end_where_they_do_not_pay_and_are_tried_again() -> None:
    choice, one = DraftPolicy(), sequence()
    for _ in range(60):
        choice.stepped(1, 1.0)
        choice.stepped(2, 1.5)
        choice.verified(one, 1, 0)
    depths = [choice.choose({one: 50})[one] for _ in range(1000)]
    assert depths[:100] == [0] * 100
    assert max(depths) > 0


def test_a_sequence_with_high_acceptance_gets_more_drafts() -> None:
    choice, good, bad = DraftPolicy(), sequence(), sequence()
    for _ in range(30):
        choice.stepped(2, 1.0)
        choice.stepped(6, 1.4)
        choice.verified(good, 2, 2)
        choice.verified(bad, 2, 0)
    depths = choice.choose({good: 50, bad: 50})
    assert depths[good] > depths[bad] == 0


def test_a_round_of_drafts_must_pay_for_its_making() -> None:
    """Seconds of a step are 1 + 0.02 a token; the cost of drafting does not depend on the number of
    drafts."""
    one = sequence()
    for cost, wanted in ((0.5, MAX_DRAFT_TOKENS), (50.0, 0)):
        choice = DraftPolicy()
        for _ in range(20):
            choice.stepped(1, 1.02)
            choice.stepped(5, 1.1)
            choice.verified(one, 1, 1)
        assert choice.choose({one: 50}) == {one: MAX_DRAFT_TOKENS}, (
            "tried while the cost is not known"
        )
        for drafts in (1, 2, 4):
            choice.drafted(drafts, cost)
        assert choice.choose({one: 50}) == {one: wanted}


def test_each_draft_costs_its_part_of_a_round() -> None:
    """Regression: one draft assumed to cost nearly as much as the four that were measured."""
    choice, one = DraftPolicy(), sequence()
    for _ in range(20):
        choice.stepped(1, 1.0)
        choice.stepped(5, 1.1)
        choice.verified(one, 1, 1)
        choice.verified(one, 2, 1)
    choice.drafted(4, 1.6)
    assert choice.choose({one: 50})[one] in (1, 2)


def test_one_slow_round_does_not_end_drafts() -> None:
    """Regression: no drafts any more after the machine was busy once."""
    choice, first, one = DraftPolicy(), DraftPolicy(), sequence()
    for _ in range(20):
        for policy in (choice, first):
            policy.stepped(1, 1.0)
            policy.stepped(5, 1.1)
            policy.verified(one, 4, 4)
        choice.drafted(4, 0.2)
    choice.drafted(4, 1000.0)
    assert choice.choose({one: 50}) == {one: MAX_DRAFT_TOKENS}
    first.drafted(4, 1000.0)
    depths = [first.choose({one: 50})[one] for _ in range(RETRY + 2)]
    assert depths[0] == 0 and depths[-1] == MAX_DRAFT_TOKENS


def test_new_sequences_start_from_the_common_acceptance() -> None:
    choice, old, new = DraftPolicy(), sequence(), sequence()
    assert choice.acceptance(new) == PRIOR
    for _ in range(300):
        choice.verified(old, 2, 0)
    assert choice.acceptance(sequence()) < 0.1 < choice.acceptance(new)
