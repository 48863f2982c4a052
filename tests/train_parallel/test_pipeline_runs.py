"""Whole runs by the command line in a pipeline: saves that move in and out of it."""

import signal
from pathlib import Path

import pytest

from tests.train_parallel.processes import finish, run, start
from tests.train_parallel.runs import PROGRAM, losses, state, wait_for_step, write_recipe

TOLERANCE = 1e-5


def command(recipe: Path, out: Path, *schedule: str) -> list[str]:
    sizes = ["--set", "parallel.pipeline=2"] if schedule else []
    for name in schedule:
        sizes += ["--set", f"parallel.pipeline_schedule={name}"]
    return [*PROGRAM, "train", str(recipe), "--out", str(out), "--quiet", *sizes]


def test_a_run_resumes_in_another_pipeline(tmp_path: Path) -> None:
    """The last layers' process gets SIGTERM; both leave one save, from which another schedule goes
    on over a change of phase and sequence length, and ends where one process ends.
    """
    recipe = write_recipe(tmp_path / "recipe")
    run(1, command(recipe, tmp_path / "alone"))
    moved = tmp_path / "moved"
    processes = start(2, command(recipe, moved, "1f1b"))
    wait_for_step(moved, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [130, 130], results
    run(2, command(recipe, moved, "zb"))
    expected, found = state(tmp_path / "alone"), state(moved)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).norm()
        assert error <= TOLERANCE * tensor.double().norm().clamp(min=1e-12), name
    pairs = list(zip(losses(tmp_path / "alone"), losses(moved), strict=True))
    assert all(one[:2] == other[:2] for one, other in pairs)
    assert [other[2] for _, other in pairs] == pytest.approx([one[2] for one, _ in pairs], rel=1e-5)
    assert (moved / "model" / "config.json").exists()
