"""`lowlat serve` and other verbs under torchrun: answers of one process, refusals in one line."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

import lowlat

from .launch import PATIENCE, finish, kill, torchrun
from .processes import listening_hosts, pids_by_rank
from .refusals import NAMES

if sys.platform != "linux":
    pytest.skip("reads /proc", allow_module_level=True)

MODEL = "minnow"
PROMPT = "The sea"
LAYOUT = ["--parallel", "pipeline=2", "--threads", "1"]


@dataclass
class Served:
    """A server of several processes."""

    launcher: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)
    """What it has written to stderr."""

    def pid(self, rank: int) -> int:
        return pids_by_rank(self.launcher.pid)[rank]


@contextlib.contextmanager
def serving() -> Iterator[Served]:
    """A server of two processes, which is killed at the end."""
    launcher = torchrun(2, "-m", "lowlat", "serve", MODEL, "--port", "0", *LAYOUT)
    lines: list[str] = []
    assert launcher.stdout is not None and launcher.stderr is not None
    errors = launcher.stderr
    reader = threading.Thread(target=lambda: lines.extend(errors), daemon=True)
    reader.start()
    try:
        greeting = launcher.stdout.readline()
        found = re.search(r"http://\S+", greeting)
        assert found is not None, greeting + "".join(lines)
        yield Served(launcher, found[0], lines)
    finally:
        kill(launcher)
        reader.join(PATIENCE)
        launcher.stdout.close()
        errors.close()


@pytest.mark.slow
def test_answers_are_those_of_one_process() -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    with serving() as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()
        hosts = [listening_hosts(server.pid(rank)) for rank in (0, 1)]
        # SIGTERM reaches all processes: process 0 ends the others.
        os.kill(server.launcher.pid, signal.SIGTERM)
        server.launcher.wait(PATIENCE)
    alone = lowlat.load(MODEL).generate(PROMPT, max_tokens=30, temperature=0)
    assert answer["choices"][0]["text"] == str(alone)
    # gloo and, in process 0, HTTP; no other address
    assert hosts == [{"127.0.0.1"}, {"127.0.0.1"}]


@pytest.mark.slow
def test_generate() -> None:
    arguments = ["-m", "lowlat", "generate", MODEL, "-p", PROMPT, "--raw", "--json", *LAYOUT]
    code, output, errors = finish(torchrun(2, *arguments, "--max-tokens", "20"))
    assert code == 0, errors
    alone = lowlat.load(MODEL).generate(PROMPT, max_tokens=20)
    assert json.loads(output)["completions"][0]["text"] == str(alone)


@pytest.mark.slow
def test_processes_that_differ_are_refused() -> None:
    code, output, errors = finish(torchrun(2, str(Path(__file__).with_name("refusals.py")), MODEL))
    assert code == 0, errors
    for name in NAMES:
        pattern = f"refused: process 1 of 2 differs from process 0 in its {name}: another, not"
        assert output.count(pattern) == 1, output


def test_other_numbers_of_processes_are_refused() -> None:
    """Without torchrun there is one process."""
    command = [sys.executable, "-m", "lowlat", "generate", MODEL, "-p", "x", *LAYOUT]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert "--parallel pipeline=2 is for 2 processes, 1 started" in line
