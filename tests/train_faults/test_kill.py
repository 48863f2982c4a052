"""Training killed at random moments: a whole save always loads, little is lost, and what the run
computes is, bit for bit, what it would have computed.

LOWLAT_KILLS is how often a run is killed; recipes are begun anew as often as that takes.
"""

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from lowlat.train.checkpoints.checkpoint import TrainingCheckpoint
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.checkpoints.store import CheckpointStore

from .training import (
    INTERVAL,
    STEPS,
    TrainServer,
    compare,
    latest,
    logged_step,
    make_tokens,
    write_recipe,
)

KILLS = int(os.environ.get("LOWLAT_KILLS", "4"))
LONGEST_LIFE = 1.6
"""Seconds after which a run is killed at the latest."""
LAST_STEPS = 20
"""Steps at the end of a recipe during which nothing is killed."""


@pytest.fixture(scope="module")
def server() -> Iterator[TrainServer]:
    server = TrainServer()
    yield server
    server.close()


@dataclass(frozen=True)
class Reference:
    """A recipe, and the folder of a run of it without interruption; its saves are all kept."""

    recipe: Path
    folder: Path

    def save(self, step: int) -> TrainingCheckpoint:
        return CheckpointStore(RunFolder(self.folder), report=pytest.fail).open(step)


@pytest.fixture(scope="module", params=["adamw", "muon"])
def reference(
    request: pytest.FixtureRequest, server: TrainServer, tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    base = tmp_path_factory.mktemp(request.param)
    make_tokens(base / "tokens")
    recipe = write_recipe(base / "recipe.toml", optimizer=request.param, keep_last=2)
    keep_all = write_recipe(base / "all.toml", optimizer=request.param, keep_last=1000)
    server.run(keep_all, base / "undisturbed")
    assert server.status() == 0
    return Reference(recipe, base / "undisturbed")


@pytest.mark.slow
def test_kills(server: TrainServer, reference: Reference, tmp_path: Path) -> None:
    chance = random.Random(KILLS)
    left = KILLS // 2
    attempt = 0
    while left > 0:
        folder = tmp_path / f"run-{attempt}"
        left = kill_until_the_end(server, reference, folder, left, chance)
        attempt += 1
        server.run(reference.recipe, folder)
        assert server.status() == 0
        compare(latest(folder), reference.save(STEPS))


def kill_until_the_end(
    server: TrainServer, reference: Reference, folder: Path, left: int, chance: random.Random
) -> int:
    """Begin and kill a run again and again, until only its last steps remain or `left` is 0.

    Returns how many kills are left.
    """
    killed = Killed(folder, reference)
    while left > 0:
        process = server.run(reference.recipe, folder)
        try:
            time.sleep(chance.uniform(0.0, LONGEST_LIFE))
            with suppress(ProcessLookupError):  # it came to its end by itself
                os.kill(process, signal.SIGKILL)
        finally:
            status = server.status()
        if status != -signal.SIGKILL:
            assert status == 0, "the run failed, see stderr"
            return left
        left -= 1
        killed.check()
        if killed.step > STEPS - LAST_STEPS - INTERVAL:
            return left
    return left


@dataclass
class Killed:
    """A run that is killed again and again."""

    folder: Path
    reference: Reference
    step: int = 0
    """Of the newest save."""
    begun: int | None = None
    """Step of a save after that one which was being written when the run was killed."""

    def check(self) -> None:
        """What the run left: its newest is whole and right, and not long ago."""
        unfinished = [int(found.name[6:14]) for found in self.folder.glob("saves/.*.writing")]
        save = latest(self.folder) if (self.folder / "lock").exists() else None
        if save is not None:
            compare(save, self.reference.save(save.step))
            if save.step > self.step:
                self.step, self.begun = save.step, None
        self.begun = max(unfinished, default=self.begun)
        logged = logged_step(self.folder)
        print(f"goes on from {self.step}, lost {logged - self.step}, under way {self.begun}")
        # The interval, and steps of a next one that were made while the save between was written;
        # the save after it waits, so there is no third.
        since = 0 if self.begun is None else max(0, logged - self.begun)
        assert since <= INTERVAL
        assert logged - self.step <= INTERVAL + since
