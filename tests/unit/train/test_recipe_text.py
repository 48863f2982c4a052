"""The text of a recipe that is kept next to its run."""

import math
import tomllib
from datetime import date, time
from pathlib import Path

import pytest

from lowlat.train.recipe.schema import read_recipe
from lowlat.train.recipe.toml import text_of, to_toml

from .test_recipe import TEXT

CHANGES = (
    "seed=3",
    "phase.0.learning_rate=[{ to = 1e-5, steps = 2 }, { to = 0 }]",
    'phase.1.data.folder="other \\"tokens\\""',
    "checkpoints.every_steps=4",
    "model.deep.er=true",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text("# as it was given\n" + TEXT)
    return path


def test_the_text_is_that_of_the_file(path: Path) -> None:
    """With its comments; the first line says where relative paths begin."""
    first, rest = text_of(path).split("\n", 1)
    assert first == f'# "{path}"; paths are relative to that file'
    assert rest == path.read_text()


def test_what_was_changed_is_in_it(path: Path) -> None:
    """Regression: a kept recipe that is not the one that ran."""
    kept = path.with_name("kept.toml")
    kept.write_text(text_of(path, CHANGES))
    assert read_recipe(kept) == read_recipe(path, CHANGES) != read_recipe(path)
    assert kept.read_text().startswith(f'# "{path}" --set "seed=3" --set ')


def test_keys_that_need_quotes(tmp_path: Path) -> None:
    raw = {"a b": 1, "c.d": {"e f": [1, {"g h": "x"}]}, "t": [{"ü": True}, {"v": 1e-5}]}
    assert tomllib.loads(to_toml(raw)) == raw


def test_what_json_cannot_hold_is_written_for_those_who_refuse_it() -> None:
    raw = {"a": float("inf"), "b": -float("inf"), "c": date(2026, 1, 2), "d": time(3, 4)}
    assert tomllib.loads(to_toml(raw)) == raw
    assert math.isnan(tomllib.loads(to_toml({"x": float("nan")}))["x"])
