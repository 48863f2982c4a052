"""A fault, a death and a power cut at every file operation of a save and of a start.

Afterwards a whole save always loads, bit for bit the old or the new one, and the next can be
written.
"""

import errno
import itertools
import os
import random
import shutil
import sys
from pathlib import Path

import pytest

from lowlat.train.checkpoints.errors import CheckpointWriteError
from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.utils import atomic_files as disk
from lowlat.utils.errors import UserError

from .power import after
from .scenarios import SCENARIOS, Scenario, check_afterwards, start
from .states import assert_is, facts, make_run, saves_in, state
from .tracing import DEATH, Tracer, die_at, fail_at, in_child, nothing

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tracer sees every fsync; nothing here depends on a real one."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


ON_ONE_THREAD = [name for name in SCENARIOS if name != "write later"]
"""A thread does the same operations; where the process dies it makes no difference."""


@pytest.fixture(params=SCENARIOS)
def scenario(request: pytest.FixtureRequest) -> Scenario:
    return SCENARIOS[request.param]


def traced(path: Path, scenario: Scenario) -> Tracer:
    """The scenario done on the prepared folder `path`."""
    with Tracer(path, nothing) as tracer:
        scenario.work(path)
    return tracer


@pytest.fixture
def prepared(tmp_path: Path, scenario: Scenario) -> Path:
    """A folder as the scenario finds it; tests work on copies."""
    scenario.prepare(tmp_path / "prepared")
    return tmp_path / "prepared"


def fresh(prepared: Path) -> Path:
    """A copy, in place of what was there."""
    run = prepared.with_name("run")
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(prepared, run)
    return run


def test_a_fault_at_every_operation(prepared: Path, scenario: Scenario) -> None:
    """Errors are one line that names the run; what had not failed is done."""
    operations = traced(fresh(prepared), scenario).operations
    for number, operation in enumerate(operations):
        code = ERRORS[number % len(ERRORS)]
        for torn in (False, True) if operation.name == "write" else (False,):
            run = fresh(prepared)
            done = True
            with Tracer(run, fail_at(number, code), torn=torn) as tracer:
                try:
                    scenario.work(run)
                except UserError as error:
                    done = False
                    assert "\n" not in str(error)
                    assert str(run) in str(error) or "checkpoint of step 3" in str(error)
            assert tracer.operations[number].name == operation.name
            unreadable = scenario.work is start and code == errno.EIO
            check_afterwards(run, scenario, done=done and not unreadable, unreadable=unreadable)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ON_ONE_THREAD, indirect=True)
def test_a_death_at_every_operation(prepared: Path, scenario: Scenario) -> None:
    """The process ends there and then, in a write also with half of it done."""
    operations = traced(fresh(prepared), scenario).operations
    for number, operation in enumerate(operations):
        for torn in (False, True) if operation.name == "write" else (False,):
            run = fresh(prepared)

            def work(run: Path = run, number: int = number, torn: bool = torn) -> None:
                with Tracer(run, die_at(number), torn=torn):
                    scenario.work(run)

            assert in_child(work) == DEATH
            check_afterwards(run, scenario, done=False)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ON_ONE_THREAD, indirect=True)
def test_a_power_cut_after_every_operation(prepared: Path, scenario: Scenario) -> None:
    """Whatever was not brought to the disk may be lost, all of it or any part."""
    run = fresh(prepared)
    operations = traced(run, scenario).operations
    for count in range(len(operations) + 1):
        state = after(prepared, run, operations[:count])
        for seed in (None, 0, 1, 2):
            cut = prepared.with_name("cut")
            shutil.rmtree(cut, ignore_errors=True)
            state.crash(cut, None if seed is None else random.Random(1000 * count + seed))
            check_afterwards(cut, scenario, done=count == len(operations))


@pytest.mark.parametrize("skipped", ["files", "folders"])
def test_power_cuts_would_show_a_missing_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skipped: str
) -> None:
    """Regression: a simulation that forgives what a disk does not."""
    scenario = SCENARIOS["write"]
    scenario.prepare(tmp_path / "prepared")
    if skipped == "files":
        monkeypatch.setattr(disk, "sync_descriptor", lambda descriptor: None)
    else:
        monkeypatch.setattr("lowlat.train.checkpoints.writer.sync_folder", lambda folder: None)
    run = fresh(tmp_path / "prepared")
    operations = traced(run, scenario).operations
    monkeypatch.undo()
    for count, seed in itertools.product(range(len(operations), -1, -1), range(3)):
        cut = tmp_path / f"cut-{count}-{seed}"
        state = after(tmp_path / "prepared", run, operations[:count])
        state.crash(cut, random.Random(1000 * count + seed))
        try:
            check_afterwards(cut, scenario, done=count == len(operations))
        except (AssertionError, UserError):
            return
    pytest.fail("no cut lost anything")


def test_operations_are_all_seen(tmp_path: Path) -> None:
    """Regression: file work that the tracer does not know of, by Python's own audit events."""
    scenario = SCENARIOS["write"]
    scenario.prepare(tmp_path / "run")
    events = {"open": "open", "os.mkdir": "mkdir", "os.rename": "rename", "os.remove": "unlink"}
    events |= {"os.rmdir": "rmdir", "os.listdir": "listdir", "os.scandir": "scandir"}

    def work() -> None:
        seen: list[str] = []

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in events and str(arguments[0]).startswith(str(tmp_path)):
                seen.append(events[event])

        sys.addaudithook(hook)
        tracer = traced(tmp_path / "run", scenario)
        made = [op.name for op in tracer.operations if op.name in (*events.values(), "read")]
        assert seen == [name.replace("read", "open") for name in made]
        assert {"open", "mkdir", "rename", "unlink", "rmdir"} <= set(seen)

    assert in_child(work) == 0


def test_a_failed_save_is_no_obstacle_to_the_same_process(tmp_path: Path) -> None:
    """After a fault at each operation the next save of the same run succeeds."""
    operations = traced(make_run(tmp_path / "first", 1, 2), SCENARIOS["write"]).operations
    failed = 0
    for number in range(len(operations)):
        path = make_run(tmp_path / f"run-{number}", 1, 2)
        with RunFolder(path) as run:
            saves = saves_in(run)
            with Tracer(path, fail_at(number, errno.ENOSPC)):
                try:
                    saves.write(3, state(3), facts(3))
                except CheckpointWriteError:
                    failed += 1
            saves.write(4, state(4), facts(4))
            assert_is(saves.latest(), 4)
            assert saves.steps()[-1] == 4 and len(saves.steps()) == 2
    assert failed > 10
