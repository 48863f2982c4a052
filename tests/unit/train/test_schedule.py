"""Schedules, ramps and phases by hand, and DeepSeek-V3's own written as a recipe."""

import itertools
from typing import Any

import pytest

from lowlat.train.recipe.schedule import TrainingSchedule, batch_size, value_at
from lowlat.train.recipe.schema import Phase, Segment, parse_recipe

from . import tiny


def values(schedule: list[dict[str, Any]], steps: int) -> list[float]:
    segments = [Segment(**segment) for segment in schedule]
    return [value_at(segments, step, steps) for step in range(steps)]


def test_a_number_is_constant() -> None:
    assert [value_at(0.5, step, 3) for step in range(3)] == [0.5] * 3


def test_warm_up_starts_above_zero_and_arrives_at_its_last_step() -> None:
    found = values([{"to": 1.0, "steps": 4}, {"to": 1.0}], 6)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_segments_start_where_the_one_before_ended() -> None:
    found = values(
        [
            {"to": 2.0, "steps": 1, "shape": "constant"},
            {"to": 2.0, "steps": 2},
            {"to": 0.0, "steps": 4, "shape": "linear"},
            {"to": 3.0, "steps": 1, "shape": "constant"},
        ],
        10,
    )
    assert found == pytest.approx([2, 2, 2, 1.5, 1, 0.5, 0, 3, 3, 3])


def test_cosine() -> None:
    found = values([{"to": 1.0, "steps": 1}, {"to": 0.2, "shape": "cosine"}], 5)
    half = 0.4 * 2**-0.5
    assert found == pytest.approx([1.0, 0.6 + half, 0.6, 0.6 - half, 0.2])


def test_the_last_segment_takes_the_rest_of_the_phase() -> None:
    found = values([{"to": 1.0, "steps": 2}, {"to": 0.0}], 7)
    assert found == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_a_last_segment_that_has_no_step_left_is_never_met() -> None:
    assert values([{"to": 1.0, "steps": 3}, {"to": 9.0}], 3) == pytest.approx([1 / 3, 2 / 3, 1.0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_grow_by_whole_micro_batches(ranks: int) -> None:
    ramp = [{"to": 2.0, "steps": 1}, {"to": 12.0, "steps": 5}, {"to": 12.0}]
    recipe = tiny.recipe(steps=9, batch_size=ramp, micro_batch_size=2)
    rows = [TrainingSchedule(recipe, ranks=ranks).at(step).rows for step in range(9)]
    assert rows == {1: [2, 4, 6, 8, 10, 12, 12, 12, 12], 2: [4, 4, 8, 8, 8, 12, 12, 12, 12]}[ranks]


def phases() -> TrainingSchedule:
    fields = {"micro_batch_size": 1, "learning_rate": 0.1}
    ramp = [{"to": 1.0, "steps": 1}, {"to": 3.0}]
    raw = {
        "name": "t",
        "model": {},
        "data": {"folder": "none"},
        "phase": [
            {"name": "a", "steps": 3, "sequence_length": 5, "batch_size": ramp} | fields,
            {"name": "b", "steps": 1, "sequence_length": 7, "batch_size": 2} | fields,
            {"name": "c", "steps": 2, "sequence_length": 11, "batch_size": 4, "mtp_weight": 0.1}
            | fields,
        ],
    }
    return TrainingSchedule(parse_recipe(raw, origin="test"))


def test_phases_follow_one_another() -> None:
    """Positions in the data restart with every other row length; tokens are counted over all."""
    table = phases()
    plans = [table.at(step) for step in range(table.steps)]
    assert [plan.step for plan in plans] == list(range(6))
    assert [plan.phase.name for plan in plans] == ["a", "a", "a", "b", "c", "c"]
    assert [plan.phase_index for plan in plans] == [0, 0, 0, 1, 2, 2]
    assert [plan.rows for plan in plans] == [1, 2, 3, 2, 4, 4]
    assert [plan.first_row for plan in plans] == [0, 1, 3, 0, 0, 4]
    assert [plan.ends_phase for plan in plans] == [False, False, True, True, False, True]
    assert [plan.mtp_weight for plan in plans] == [0.3] * 4 + [0.1] * 2
    assert [plan.tokens for plan in plans] == [5, 10, 15, 14, 44, 44]
    before = [0, *itertools.accumulate(plan.tokens for plan in plans)]
    assert [table.tokens_before(step) for step in range(7)] == before
    assert table.tokens == before[-1] == 132


def test_a_phase_continues_in_the_data_of_the_one_before() -> None:
    """As long as folder, masks, infilling and row length are the same, said once or twice; batches
    may differ. After other data it restarts.
    """
    own = {"data": {"folder": "none"}}
    table = of_phases({}, own | {"batch_size": 4}, {}, {"sequence_length": 7}, own)
    plans = [table.at(step) for step in range(table.steps)]
    assert [plan.first_row for plan in plans] == [0, 2, 4, 8, 12, 14, 0, 2, 0, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"sequence_length": 6},
        {"data": {"folder": "other"}},
        {"data": {"folder": "none", "document_masks": True}},
        {"data": {"folder": "none", "fim_rate": 0.5}},
    ],
)
def test_a_phase_with_other_rows_restarts(change: dict[str, Any]) -> None:
    assert of_phases({}, change).at(2).first_row == 0


def of_phases(*changes: dict[str, Any]) -> TrainingSchedule:
    """Two steps of two rows in every phase."""
    fields = {"name": "p", "steps": 2, "sequence_length": 5, "batch_size": 2}
    fields |= {"micro_batch_size": 1, "learning_rate": 0.1}
    raw = {"name": "t", "model": {}, "data": {"folder": "none"}}
    return TrainingSchedule(
        parse_recipe(raw | {"phase": [fields | change for change in changes]}, origin="test")
    )


T, B = 10**12, 10**9
V3_STEPS = {"ramp": 12_424, "constant": 151_493, "cosine": 68_347, "low": 5_293, "last": 2_654}
"""Optimiser steps of each part, from tokens over 4096 tokens a row and the rows of its batches."""


def v3() -> Phase:
    """DeepSeek-V3 section 4.2: 14.8T tokens."""
    before = V3_STEPS["ramp"] + V3_STEPS["constant"]
    return tiny.recipe(
        steps=sum(V3_STEPS.values()),
        sequence_length=4096,
        batch_size=[
            {"to": 3072, "steps": 1, "shape": "constant"},
            {"to": 15360, "steps": V3_STEPS["ramp"]},
            {"to": 15360},
        ],
        learning_rate=[
            {"to": 2.2e-4, "steps": 2000},
            {"to": 2.2e-4, "steps": before - 2000},
            {"to": 2.2e-5, "steps": V3_STEPS["cosine"], "shape": "cosine"},
            {"to": 2.2e-5, "steps": V3_STEPS["low"]},
            {"to": 7.3e-6, "shape": "constant"},
        ],
        mtp_weight=[
            {"to": 0.3, "steps": before, "shape": "constant"},
            {"to": 0.1, "shape": "constant"},
        ],
        bias_update_speed=[
            {"to": 1e-3, "steps": before + V3_STEPS["cosine"], "shape": "constant"},
            {"to": 0.0, "shape": "constant"},
        ],
    ).phase[0]


def test_the_published_schedule_of_deepseek_v3() -> None:
    phase = v3()

    def at(step: int, field: str) -> float:
        return value_at(getattr(phase, field), step, phase.steps)

    ramp, ten = V3_STEPS["ramp"], V3_STEPS["ramp"] + V3_STEPS["constant"]
    end = ten + V3_STEPS["cosine"]
    last = end + V3_STEPS["low"]
    rates = {
        999: 1.1e-4,
        1999: 2.2e-4,
        ten - 1: 2.2e-4,
        ten + V3_STEPS["cosine"] // 2: (2.2e-4 + 2.2e-5) / 2,
        end - 1: 2.2e-5,
        last - 1: 2.2e-5,
        last: 7.3e-6,
        phase.steps - 1: 7.3e-6,
    }
    assert {step: at(step, "learning_rate") for step in rates} == pytest.approx(rates, rel=1e-4)
    assert (at(ten - 1, "mtp_weight"), at(end - 1, "bias_update_speed")) == (0.3, 1e-3)
    assert (at(ten, "mtp_weight"), at(end, "bias_update_speed")) == (0.1, 0.0)
    rows = [batch_size(phase, step, 1) for step in range(0, phase.steps, 16)]
    assert (rows[0], rows[ramp // 16 + 1], rows[-1]) == (3072, 15360, 15360)
    # Every 16th step stands for the 16 around it.
    tokens = [16 * 4096 * count for count in itertools.accumulate(rows)]
    published = {ramp: 469 * B, ten: 10 * T, end: 14.3 * T, last: 14.3 * T + 333 * B}
    for step, expected in published.items():
        assert tokens[step // 16] == pytest.approx(expected, rel=2e-3)
    assert tokens[-1] == pytest.approx(14.8 * T, rel=2e-3)
