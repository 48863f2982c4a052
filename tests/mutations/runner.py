"""Applies mutants to a copy of the package and runs each one's test against it.

One process collects all tests; each mutant's test runs in a fork of it, in which the code of the
mutated functions is replaced: nothing is imported twice. A mutant that lies elsewhere, or that goes
unnoticed so, has a fork of a process that has torch and pytest loaded, which imports the mutated
copy.
"""

import contextlib
import gc
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, TextIO, final

import pytest
import torch
from _pytest.runner import runtestprotocol

from .mutants import Mutant
from .swap import Functions, NotInFunctions

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


def run_mutants(workspace: Path, mutants: Sequence[Mutant]) -> Iterator[Outcome]:
    """Put each mistake in, run its test, take it out.

    All tests must pass on the package as it is; RuntimeError with pytest's output otherwise.
    """
    sys.dont_write_bytecode = False
    session, results = _start_session(workspace, mutants)
    sys.dont_write_bytecode = True
    left = []
    with results:
        # Without a line the session has ended early.
        code, _, output = json.loads(results.readline() or '[70, 0, ""]')
        if code != PASSED:
            os.waitpid(session, 0)
            log = (workspace / "session.txt").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the tests fail without any mistake put in:\n{log}{output}")
        for mutant in mutants:
            code, seconds, output = json.loads(results.readline())
            if code == FAILED:
                yield Outcome(mutant=mutant, killed=True, seconds=seconds, output=output)
            else:
                left.append(mutant)
    os.waitpid(session, 0)
    for mutant in left:
        yield run_mutant(workspace, mutant)


def _start_session(workspace: Path, mutants: Sequence[Mutant]) -> tuple[int, TextIO]:
    """A fork that collects the tests; its id, and lines of JSON, [exit code, seconds, output]:
    of all tests without a mistake, which must pass, then of each mutant.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        tests = list(dict.fromkeys(mutant.test for mutant in mutants))
        with open(writing, "w", encoding="utf-8", buffering=1) as results:
            session = MutantSession(workspace, mutants, results)
            _in_child(workspace, tests, workspace / "session.txt", session)
    os.close(writing)
    return child, open(reading, encoding="utf-8")


def run_mutant(workspace: Path, mutant: Mutant) -> Outcome:
    """Put the mistake in, run its test with a new import, take it out."""
    began = time.monotonic()
    with applied(workspace, mutant):
        code, output = run_tests(workspace, [mutant.test])
    if code not in (PASSED, FAILED):
        raise RuntimeError(f"{mutant.name}: pytest ended with {code}:\n{output}")
    seconds = time.monotonic() - began
    return Outcome(mutant=mutant, killed=code == FAILED, seconds=seconds, output=output)


@contextlib.contextmanager
def applied(workspace: Path, mutant: Mutant) -> Iterator[tuple[str, str]]:
    """The copy with the mistake, its text before and now; ValueError unless the text to replace is
    there exactly once.

    The file has another time meanwhile, so that Python does not use its cached bytecode.
    """
    path = workspace / "lowlat" / mutant.file
    text, times = path.read_text(encoding="utf-8"), path.stat()
    if text.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: {mutant.file} has its text {text.count(mutant.old)} times, not once"
        )
    changed = text.replace(mutant.old, mutant.new)
    path.write_text(changed, encoding="utf-8")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 10**10))
    try:
        yield text, changed
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


@final
class MutantSession:
    """Plugin that runs the tests of a session once as they are, then each mutant's in a fork."""

    def __init__(self, workspace: Path, mutants: Sequence[Mutant], results: TextIO) -> None:
        self.workspace, self.mutants, self.results = workspace, mutants, results

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's loop. Without a result for the first mutant, if a test fails."""
        if session.testsfailed:
            raise session.Interrupted("errors during collection")
        session.config._tmp_path_factory.getbasetemp()  # pyright: ignore[reportAttributeAccessIssue]
        functions = Functions(self.workspace)
        code, output = self._run(session.items)
        print(json.dumps([code, 0.0, output]), file=self.results)
        if code != PASSED:
            return True
        sys.dont_write_bytecode = True  # a mistake's must not stay
        for mutant in self.mutants:
            began = time.monotonic()
            test, path = mutant.test, self.workspace / "lowlat" / mutant.file
            items = [i for i in session.items if test in (i.nodeid, i.nodeid.partition("[")[0])]
            with applied(self.workspace, mutant) as texts:
                code, output = self._run(items, partial(functions.swap, path, *texts))
            print(json.dumps([code, time.monotonic() - began, output]), file=self.results)
        return True

    def _run(
        self, items: Sequence[pytest.Item], prepare: Callable[[], object] = lambda: None
    ) -> tuple[int, str]:
        """Exit code and output of tests in a fork, up to the first that fails."""
        log = self.workspace / "output.txt"
        child = os.fork()
        if child == 0:
            code, output = CRASHED, ""
            try:
                prepare()
                code, output = _outcome_of(items)
            except NotInFunctions:
                code = SKIPPED
            except BaseException:
                output = traceback.format_exc()
            finally:
                log.write_text(output, encoding="utf-8", errors="replace")
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output = log.read_text(encoding="utf-8")
        return os.waitstatus_to_exitcode(status), output


def _outcome_of(items: Sequence[pytest.Item]) -> tuple[int, str]:
    """Runs tests up to the first that fails."""
    ran = 0
    for item, following in zip(items, [*items[1:], None], strict=True):
        for report in runtestprotocol(item, log=False, nextitem=following):
            if report.failed:
                return FAILED, report.longreprtext
            ran += report.when == "call" and report.passed
    return (PASSED if ran else SKIPPED), ""


def run_tests(workspace: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit code and output of pytest on node ids, against the copy in `workspace`."""
    log = workspace / "output.txt"
    child = os.fork()
    if child == 0:
        _in_child(workspace, tests, log)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), log.read_text(encoding="utf-8", errors="replace")


def _in_child(workspace: Path, tests: Sequence[str], log: Path, *plugins: object) -> NoReturn:
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
        code = int(
            pytest.main([*OPTIONS, "--rootdir", str(workspace), *tests], plugins=[ran, *plugins])
        )
        if code == PASSED and not ran.tests:
            code = SKIPPED
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
