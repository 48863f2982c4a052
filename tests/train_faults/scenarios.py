"""Pieces of file work during which something goes wrong, and what must hold afterwards."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lowlat.train.checkpoints.run_folder import RunFolder

from .states import assert_is, facts, make_run, saves_in, state

RECIPE, NEW_RECIPE = 'name = "old"\n', 'name = "new, and longer"\n'


@dataclass(frozen=True)
class Scenario:
    """Work on a run's folder that has whole saves of steps 1 and 2, or what `prepare` makes."""

    work: Callable[[Path], None]
    newest_after: int
    """The newest save once the work is done."""
    prepare: Callable[[Path], object] = lambda path: make_run(path, 1, 2)
    newest_before: int = 2


def write(path: Path) -> None:
    """One save, which pushes the oldest out."""
    with RunFolder(path) as run:
        saves_in(run).write(3, state(3), facts(3))


def write_async(path: Path) -> None:
    with RunFolder(path) as run:
        saves = saves_in(run)
        saves.write_async(3, state(3), facts(3))
        saves.close()


def start(path: Path) -> None:
    """A run begins: clears what dead ones left, passes over a broken save."""
    with RunFolder(path) as run:
        assert_is(saves_in(run).latest(), 2, 1)  # 1 where a file of 2 could not be read


def write_recipe(path: Path) -> None:
    with RunFolder(path) as run:
        run.write_recipe(NEW_RECIPE)


def leftovers(path: Path) -> None:
    """Checkpoints 1, 2 and 3, of which 3 has a flipped bit; one half written, two half removed."""
    with RunFolder(path) as run:
        saves = saves_in(run, keep_last=5)
        for step in range(5):
            saves.write(step, state(step), facts(step))
        shutil.copytree(
            run.checkpoints / "step-00000001", run.checkpoints / ".step-00000006.writing"
        )
        (run.checkpoints / ".step-00000006.writing" / "manifest.json").unlink()
        for gone in ("step-00000000", "step-00000004"):
            (run.checkpoints / gone).rename(run.checkpoints / f".{gone}.deleting")
        (run.checkpoints / ".step-00000000.deleting" / "facts.json").unlink()
        broken = run.checkpoints / "step-00000003" / "state.safetensors"
        content = bytearray(broken.read_bytes())
        content[-1] ^= 1
        broken.write_bytes(content)


def with_recipe(path: Path) -> None:
    make_run(path, 1, 2)
    with RunFolder(path) as run:
        run.write_recipe(RECIPE)


SCENARIOS = {
    "write": Scenario(write, newest_after=3),
    "write later": Scenario(write_async, newest_after=3),
    "start": Scenario(start, newest_after=2, prepare=leftovers),
    "keep recipe": Scenario(write_recipe, newest_after=2, prepare=with_recipe),
}


def check_afterwards(
    path: Path, scenario: Scenario, *, done: bool, unreadable: bool = False
) -> int:
    """The run begins again: its newest is the old one or the new one, and saving works.

    done: the work had ended without an error. unreadable: save 2 may have been passed over, then
    it must lie aside. Returns the step that was found.
    """
    allowed = (scenario.newest_after,) if done else (scenario.newest_before, scenario.newest_after)
    reports: list[str] = []
    with RunFolder(path) as run:
        assert not run.recipe.exists() or run.recipe.read_text() in (RECIPE, NEW_RECIPE)
        saves = saves_in(run, reports.append)
        if unreadable and (run.checkpoints / "step-00000002.broken").exists():
            allowed = (1,)
        found = assert_is(saves.latest(), *allowed)
        assert all("step-00000003" in line and scenario.work is start for line in reports)
        for step in (7, 8):
            saves.write(step, state(step), facts(step))
            assert_is(saves.latest(), step)
        left = {entry.name for entry in run.checkpoints.iterdir() if ".broken" not in entry.name}
        assert left == {"step-00000007", "step-00000008"}
    return found
