"""Applies mutants to a copy of the package and runs each one's test against it.

Tests run in forks of one process that has torch and pytest loaded already: a fork takes a tenth
of a second, a new interpreter three. lowlat itself is imported in the forks only.
"""

import contextlib
import gc
import importlib
import io
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, final

import pytest
import torch

from .mutants import Mutant

REPOSITORY = Path(__file__).parents[2]
COPIED = ("lowlat", "tests", "benchmarks", "pyproject.toml")
PRELOADED = ("hypothesis", "jaxtyping", "beartype", "safetensors.torch", "filelock", "pydantic")
PRELOADED += ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.nn.attention.bias")
PRELOADED += ("compressed_tensors.compressors", "gguf", "tokenizers", "rich.live", "httpx")

PASSED, FAILED, CRASHED, SKIPPED = 0, 1, 70, 71
"""Exit codes; all but pytest's first two mean that the tests could not run."""

# Without addopts shapes and types are not checked: an assertion of the test must notice.
# Every fork imports tests and plugins anew: without rewritten asserts, and without the plugins of
# libraries, that takes half a second instead of four.
OPTIONS = (
    "-x",
    "-q",
    "-rs",
    "--tb=short",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=",
    "--assert=plain",
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one mutant."""

    mutant: Mutant
    killed: bool
    seconds: float
    output: str
    """What pytest printed."""


def prepare(workspace: Path) -> None:
    """Copy the package and its tests, and load what every test needs."""
    assert "lowlat" not in sys.modules, "forks would share the package that is loaded already"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # An editable install finds the original before the copy's folder is looked at.
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
    ignore = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        source, target = REPOSITORY / name, workspace / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copy(source, target)
    shutil.copy(native_module(), workspace / "lowlat")
    for module in PRELOADED:
        importlib.import_module(module)
    with contextlib.suppress(AssertionError):
        # The first message of a failed comparison imports sympy.
        torch.testing.assert_close(torch.zeros(1), torch.ones(1))
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--version"])  # loads pytest's own plugins
    gc.disable()
    gc.freeze()


def native_module() -> Path:
    """The compiled module, which an editable install keeps outside the repository.

    CalledProcessError if none is installed.
    """
    command = [sys.executable, "-c", "import lowlat._native; print(lowlat._native.__file__)"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def check_baseline(workspace: Path, mutants: Sequence[Mutant]) -> None:
    """All named tests pass on the package as it is; RuntimeError with pytest's output otherwise.

    The bytecode that they leave in the copy is what mutants run with.
    """
    tests = list(dict.fromkeys(mutant.test for mutant in mutants))
    sys.dont_write_bytecode = False
    code, output = run_tests(workspace, tests)
    sys.dont_write_bytecode = True  # a mistake's must not stay
    if code != PASSED:
        raise RuntimeError(f"the tests fail without any mistake put in:\n{output}")


def run_mutant(workspace: Path, mutant: Mutant) -> Outcome:
    """Put the mistake in, run its test, take it out."""
    began = time.monotonic()
    with applied(workspace, mutant):
        code, output = run_tests(workspace, [mutant.test])
    if code not in (PASSED, FAILED):
        raise RuntimeError(f"{mutant.name}: pytest ended with {code}:\n{output}")
    seconds = time.monotonic() - began
    return Outcome(mutant=mutant, killed=code == FAILED, seconds=seconds, output=output)


@contextlib.contextmanager
def applied(workspace: Path, mutant: Mutant) -> Iterator[None]:
    """The copy with the mistake; ValueError unless the text to replace is there exactly once.

    The file has another time meanwhile, so that Python does not use its cached bytecode.
    """
    path = workspace / "lowlat" / mutant.file
    text, times = path.read_text(encoding="utf-8"), path.stat()
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.file} has its text {text.count(mutant.old)} times, not once"
        )
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**10))
    try:
        yield
    finally:
        path.write_text(text, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@final
class Ran:
    """Counts the tests that ran: one that is skipped notices no mistake."""

    def __init__(self) -> None:
        self.tests = 0

    def pytest_runtest_call(self) -> None:
        self.tests += 1


def run_tests(workspace: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest on node ids, against the copy in `workspace`."""
    log = workspace / "output.txt"
    child = os.fork()
    if child == 0:
        _in_child(workspace, tests, log)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def _in_child(workspace: Path, tests: Sequence[str], log: Path) -> NoReturn:
    """Ends the process whatever happens: what the parent has open is not its to clean up."""
    code = CRASHED
    try:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(workspace)
        sys.path.insert(0, str(workspace))
        # The package `tests` is the original's; pytest must import the copy's.
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        ran = Ran()
        code = int(pytest.main([*OPTIONS, "--rootdir", str(workspace), *tests], plugins=[ran]))
        if code == PASSED and not ran.tests:
            code = SKIPPED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
