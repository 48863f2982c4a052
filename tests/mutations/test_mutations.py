"""Every mistake of the list is noticed by the test that is named for it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.native.inputs import needs_native

from .mutants import MUTANTS, Mutant
from .runner import REPOSITORY, applied

PARTS = 2
"""Processes that share the mutants, so that pytest's workers can run them at the same time."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_still_applies(mutant: Mutant) -> None:
    """The replaced text is there exactly once, and what replaces it is Python."""
    text = (REPOSITORY / "lowlat" / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1 and mutant.old != mutant.new
    compile(text.replace(mutant.old, mutant.new), mutant.file, "exec")
    assert (REPOSITORY / mutant.test.partition("::")[0]).is_file()


def test_the_quick_suite_kills_every_mutant() -> None:
    """No test that a mutant names is marked slow."""
    for mutant in MUTANTS:
        file, _, name = mutant.test.partition("::")
        head = (
            (REPOSITORY / file).read_text(encoding="utf-8").split(f"def {name.split('[')[0]}(")[0]
        )
        decorators = head.rpartition("\n\n\n")[2]
        assert "mark.slow" not in decorators, mutant.test


def test_a_mutant_that_no_longer_applies_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "lowlat").mkdir()
    (tmp_path / "lowlat" / "file.py").write_text("a = 1\na = 1\n")
    twice = Mutant("twice", "file.py", "a = 1", "a = 2", "")
    with pytest.raises(ValueError, match="2 times, not once"), applied(tmp_path, twice):
        pass


def test_a_mutant_is_taken_out_again(tmp_path: Path) -> None:
    (tmp_path / "lowlat").mkdir()
    file = tmp_path / "lowlat" / "file.py"
    file.write_text("a = 1\n")
    with applied(tmp_path, Mutant("once", "file.py", "a = 1", "a = 2", "")):
        assert file.read_text() == "a = 2\n"
    assert file.read_text() == "a = 1\n"


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_all_mistakes_are_noticed(part: int) -> None:
    """In an interpreter of its own, without the package, whose forks import the mutated copy."""
    command = [sys.executable, "-m", "tests.mutations", "--part", f"{part}/{PARTS}"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    count = len(MUTANTS[part - 1 :: PARTS])
    assert f"{count} of {count} killed" in done.stdout
