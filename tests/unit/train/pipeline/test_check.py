"""Pipelines that cannot be are refused before anything is read."""

from typing import Any

import pytest

from lowlat.train.inputs.parallel_check import check_micro_batches, check_parallel
from lowlat.train.pipeline.stages import Schedule
from lowlat.train.recipe.schema import Recipe, parse_recipe
from lowlat.utils.errors import UserError
from tests.unit.train import tiny


def recipe(rows: int | list[dict[str, Any]] = 8, **parallel: int | str) -> Recipe:
    phase = {
        "name": "only",
        "steps": 5,
        "sequence_length": tiny.LENGTH,
        "batch_size": rows,
        "micro_batch_size": 1,
        "learning_rate": 0.1,
    }
    raw = {"name": "r", "model": {}, "data": {"folder": "f"}, "phase": [phase]}
    return parse_recipe(raw | {"parallel": parallel}, origin="r.toml")


CONFIG = tiny.config(num_hidden_layers=7)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zb", "zbv", "dualpipev"])
def test_what_fits_is_accepted(schedule: str) -> None:
    check_parallel(CONFIG, recipe(pipeline=4, pipeline_schedule=schedule), "r.toml")
    check_parallel(CONFIG, recipe(pipeline=2, data=2, pipeline_schedule=schedule), "r.toml")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"pipeline": 9}, ["r.toml", "parallel.pipeline 9", "9 stages", "num_hidden_layers 7"]),
        ({"pipeline": 5, "pipeline_schedule": "zbv"}, ["10 stages", "zbv"]),
        ({"pipeline": 4, "data": 4}, ["phase only", "2 micro-batches", "1f1b", "needs 4"]),
        (
            {"pipeline": 4, "data": 2, "pipeline_schedule": "dualpipev"},
            ["4 micro-batches", "dualpipev", "needs 8", "batch_size"],
        ),
        (
            {"pipeline": 3, "pipeline_schedule": "interleaved", "rows": 7},
            ["7 micro-batches", "2 rounds", "interleaved"],
        ),
        (
            {"pipeline": 2, "fsdp": 2, "pipeline_schedule": "dualpipev"},
            ["the embedding is in two stages", "fsdp"],
        ),
    ],
)
def test_what_does_not_fit_is_named(sizes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_parallel(CONFIG, recipe(**sizes), "r.toml")
    for word in words:
        assert word in str(caught.value)


def test_every_size_of_a_ramp_is_looked_at() -> None:
    """3 of 5 steps have enough rows."""
    ramp = [{"to": 6.0, "steps": 5, "shape": "linear"}]
    with pytest.raises(UserError, match="micro-batches per process, but 1f1b"):
        check_parallel(CONFIG, recipe(rows=ramp, pipeline=3), "r.toml")


@pytest.mark.parametrize(
    ("schedule", "count"), [("1f1b", 3), ("interleaved", 5), ("zb", 8), ("zbv", 1)]
)
def test_numbers_that_pytorch_takes(schedule: Schedule, count: int) -> None:
    check_micro_batches(schedule, 3, count, "here")
