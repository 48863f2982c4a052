"""Whole runs by the command line in a pipeline: saves that move in and out of it."""

import signal
from pathlib import Path

import pytest

from tests.train_parallel.processes import finish, run, start
from tests.train_parallel.runs import PROGRAM, assert_same_end, wait_for_step, write_recipe


def command(recipe: Path, out: Path, *schedule: str) -> list[str]:
    sizes = ["--set", "parallel.pipeline=2"] if schedule else []
    for name in schedule:
        sizes += ["--set", f"parallel.pipeline_schedule={name}"]
    return [*PROGRAM, "train", str(recipe), "--out", str(out), "--quiet", *sizes]


@pytest.mark.slow
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
    assert_same_end(tmp_path / "alone", moved)
