"""Verbs under torchrun: errors of a command line are those of process 0, which alone writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lowlat.utils.errors import UserError
from lowlat.utils.heartbeat import GRACE_SECONDS

Invoke = Callable[..., Result]
LAYOUT = ("--parallel", "pipeline=2")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """This process is process 1 of 2, and how long it waits."""
    seconds: list[float] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("lowlat.utils.process_group.time.sleep", seconds.append)
    monkeypatch.setattr("lowlat.cli.inputs.process_threads", lambda parallel, threads: 1)
    return seconds


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "model", "--peers", "vllm", *LAYOUT),
        ("bench", "model", "--parallel", "prefill=1"),
        ("bench", "./missing", *LAYOUT),
        ("generate", "model", "-p", "x", "--raw", "--system", "y", *LAYOUT),
        ("eval", "model", "--text", "x", "--expert-loads", "y", *LAYOUT),
        ("serve", "model", "--memory", "1", *LAYOUT),
    ],
    ids=" ".join,
)
def test_a_follower_gives_process_0_the_time_to_print_the_error(
    lowlat: Invoke, waits: list[float], arguments: tuple[str, ...]
) -> None:
    assert isinstance(lowlat(*arguments).exception, UserError)
    assert waits == [GRACE_SECONDS]


def test_a_follower_makes_no_folder_of_results(
    lowlat: Invoke, waits: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def follow(*_: Any) -> None:
        raise SystemExit(0)

    monkeypatch.setattr("lowlat.bench.parallel.bench_parallel", follow)
    result = lowlat("bench", "model", *LAYOUT, "--out", str(tmp_path / "new"))
    assert result.exit_code == 0 and not (tmp_path / "new").exists()
