"""The run's folder: one process at a time, whatever became of the one before."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.utils.errors import UserError
from tests import forked

HOLD = """
import sys, time
from pathlib import Path
from lowlat.train.checkpoints.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.acquire()
print("held", flush=True)
time.sleep(600)
"""
FORK_AND_DIE = """
import os, signal, sys, time
from pathlib import Path
from lowlat.train.checkpoints.run_folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.acquire()
child = os.fork()
if child == 0:
    os.close(1)  # whoever reads the parent's output waits for nobody else
    os.write(int(sys.argv[2]), b"x")
    time.sleep(600)
print(child, flush=True)
os.read(int(sys.argv[3]), 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_places(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "a" / "run")
    assert not run.path.exists()
    with run:
        assert run.held
        assert run.checkpoints.is_dir() and run.tensorboard.is_dir()
        assert run.log == tmp_path / "a" / "run" / "log.jsonl"
        assert not run.recipe.exists()
        run.write_recipe("name = 'ä'\n")
        run.write_recipe("name = 'ö'\n")
        assert run.recipe.read_text(encoding="utf-8") == "name = 'ö'\n"
    assert not run.held
    assert {entry.name for entry in run.path.iterdir()} == {
        "lock",
        "recipe.toml",
        "saves",
        "tensorboard",
    }


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    """Kill -9 leaves the lock's file but not the lock."""
    holder = forked.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == b"held\n"
        for _ in range(2):
            with pytest.raises(UserError) as refusal:
                RunFolder(tmp_path / "run").acquire()
            assert str(refusal.value) == (
                f"{tmp_path / 'run'}: process {holder.pid} trains in this folder; "
                "wait for it to end or name another folder"
            )
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunFolder(tmp_path / "run") as run:
            assert run.held


def test_a_second_holder_in_the_same_process_is_refused(tmp_path: Path) -> None:
    with RunFolder(tmp_path) as run:
        with pytest.raises(UserError, match=f"process {os.getpid()} trains in this folder"):
            RunFolder(tmp_path).acquire()
        assert run.held
    with RunFolder(tmp_path):
        pass


def test_forked_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    """Regression: workers that outlive a killed run and lock its folder against resuming."""
    ready, tell = os.pipe()
    command = [sys.executable, "-c", FORK_AND_DIE, str(tmp_path / "run"), str(tell), str(ready)]
    killed = forked.run(
        command, stdout=subprocess.PIPE, pass_fds=(ready, tell), timeout=600, check=False
    )
    child = int(killed.stdout)
    try:
        assert killed.returncode == -signal.SIGKILL
        os.kill(child, 0)
        RunFolder(tmp_path / "run").acquire()
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_folder_of_other_things_is_refused(tmp_path: Path) -> None:
    """Regression: a run that litters a home folder given by mistake."""
    (tmp_path / "letter.txt").write_text("precious")
    with pytest.raises(UserError, match="is not empty and is not a run folder"):
        RunFolder(tmp_path).acquire()
    assert [entry.name for entry in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("what", ["a file", "below a file", "saves is a file"])
def test_unusable_folders(tmp_path: Path, what: str) -> None:
    place = tmp_path / "run"
    if what == "saves is a file":
        with RunFolder(place) as run:
            run.checkpoints.rmdir()
        run.checkpoints.write_text("")
    else:
        place.write_text("")
        place = place if what == "a file" else place / "below"
    for _ in range(2):  # a failed attempt keeps no lock
        with pytest.raises(UserError, match=r"cannot be used, .*(Not a directory|File exists)"):
            RunFolder(place).acquire()
