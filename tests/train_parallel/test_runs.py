"""Whole runs by the command line in several processes: saves that move between layouts, signals,
failures.
"""

import signal
from pathlib import Path
from typing import Any

import pytest

from lowlat.model.transformer import Transformer
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.recipe.schema import read_recipe
from lowlat.train.run import trainer as trainer
from lowlat.train.step.balance import LoadBalancer
from tests.train_parallel.choices import Margin
from tests.train_parallel.processes import finish, run, start
from tests.train_parallel.runs import PROGRAM, assert_same_end, wait_for_step, write_recipe
from tests.unit.train.runs import Notes


def sizes(**parallel: int) -> list[str]:
    return [
        word for axis, size in parallel.items() for word in ("--set", f"parallel.{axis}={size}")
    ]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def command(recipe: Path, out: Path, *options: str) -> list[str]:
    return [*PROGRAM, "train", str(recipe), "--out", str(out), "--quiet", *options]


@pytest.mark.slow
def test_a_run_resumes_in_another_layout(recipe: Path, tmp_path: Path) -> None:
    """SIGTERM to one process ends all after the same step; others go on from the save they left,
    in a layout of their own, over a change of phase, and end where one process ends.
    """
    run(1, command(recipe, tmp_path / "alone"))
    moved = tmp_path / "moved"
    processes = start(2, command(recipe, moved, *sizes(tensor=2)))
    wait_for_step(moved, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _, _ in results] == [130, 130], results
    assert "stopped after" in results[0][2] and not results[1][2]
    run(2, command(recipe, moved, *sizes(fsdp=2, expert=2)))
    assert_same_end(tmp_path / "alone", moved)


def test_no_rounding_decides_about_experts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the layouts of these tests may train differently: take another SEED."""
    found: list[Margin] = []

    def watch(model: Transformer, **options: Any) -> LoadBalancer:
        found.append(Margin(model))
        return LoadBalancer(model, **options)

    monkeypatch.setattr(trainer, "LoadBalancer", watch)
    with RunFolder(tmp_path / "run") as folder:
        trainer.Trainer(read_recipe(recipe), folder, Notes(), base=recipe.parent).run()
    assert len(found) == 2, "one of each phase"
    assert min(margin.smallest for margin in found) > 1e-5


def test_an_error_is_reported_once(recipe: Path, tmp_path: Path) -> None:
    options = [*sizes(data=2), "--set", "data.folder=none"]
    results = finish(start(2, command(recipe, tmp_path / "run", *options)))
    errors = "".join(text for _, _, text in results)
    assert all(code for code, _, _ in results), results
    assert "none: no such folder" in errors
    assert errors.count("lowlat: error") == errors.count("\n") == 1, errors


@pytest.mark.slow
def test_a_killed_process_ends_the_others(recipe: Path, tmp_path: Path) -> None:
    steps = ["--set", "phase.0.steps=100000"]
    processes = start(2, command(recipe, tmp_path / "run", *sizes(data=2), *steps))
    wait_for_step(tmp_path / "run", 1, processes)
    processes[1].kill()
    results = finish(processes)
    assert results[0][0] == 2 and "another process of the run has died" in results[0][2], results
