"""From options to recipes."""

import tomllib
from collections.abc import Callable
from itertools import pairwise

import pytest
from lowlat_lab.study.plan import StudyPlan, choose_variants, num_steps
from lowlat_lab.study.sizes import TINY, find_size

from lowlat.train.recipe.schedule import TrainingSchedule
from lowlat.train.recipe.schema import parse_recipe
from lowlat.train.recipe.toml import to_toml
from lowlat.utils.errors import UserError

MakePlan = Callable[..., StudyPlan]


def test_runs_take_turns(make_plan: MakePlan) -> None:
    order = [(variant.name, seed) for variant, seed in make_plan(seeds=(1, 2, 3)).runs]
    assert order == [("mha", 1), ("mla", 1), ("mla", 2), ("mha", 2), ("mha", 3), ("mla", 3)]


def test_arms_differ_in_their_model_alone(make_plan: MakePlan) -> None:
    plan = make_plan()
    recipes = [
        plan.recipe(variant, 1).model_dump(exclude={"model", "name"}) for variant in plan.variants
    ]
    assert recipes[0] == recipes[1]
    assert plan.recipe(plan.variants[0], 2).seed == 2


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 40])
def test_the_rate_rises_stays_and_falls(make_plan: MakePlan, steps: int) -> None:
    plan = make_plan(steps=steps)
    times = TrainingSchedule(plan.recipe(plan.variants[0], 1))
    rates = [times.at(step).learning_rate for step in range(steps)]
    peak = plan.size.learning_rate
    assert max(rates) == pytest.approx(peak) and times.tokens == plan.tokens
    place = rates.index(max(rates))
    assert all(a >= b for a, b in pairwise(rates[place:]))
    if steps > 3:
        assert rates[-1] == pytest.approx(0.05 * peak)


def test_recipes_are_toml(make_plan: MakePlan) -> None:
    plan = make_plan()
    raw = plan.raw_recipe(plan.variants[1], 2)
    assert tomllib.loads(to_toml(raw)) == raw
    assert parse_recipe(tomllib.loads(to_toml(raw)), origin="x") == plan.recipe(plan.variants[1], 2)


def test_strings_of_recipes_are_quoted() -> None:
    raw = {"a": 'x"\\é\n', "t": {"b": [1, 2.5e-7], "c": True}, "r": [{"d": [{"e": 1e-9}]}]}
    assert tomllib.loads(to_toml(raw)) == raw


def test_choosing_variants(make_plan: MakePlan) -> None:
    variants = make_plan().variants
    assert choose_variants(variants, None) == variants == choose_variants(variants, "mla, mha")
    with pytest.raises(UserError, match="'gqa' is unknown; choose from mha, mla"):
        choose_variants(variants, "mha,gqa")
    with pytest.raises(UserError, match="give mha, the baseline, and one more"):
        choose_variants(variants, "mla")


def test_length_of_a_run() -> None:
    assert num_steps(TINY, steps=None, tokens=None) == TINY.steps
    assert num_steps(TINY, steps=7, tokens=None) == 7
    assert num_steps(TINY, steps=None, tokens=5 * 1024 + 100) == 5
    with pytest.raises(UserError, match="give one of them"):
        num_steps(TINY, steps=7, tokens=7)
    with pytest.raises(UserError, match="--size 'huge' is unknown; choose one of tiny"):
        find_size("huge")
