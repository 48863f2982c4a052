"""Workers of a fake program."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowlat.peers.worker import Worker


@pytest.fixture
def fake_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets workers import the modules of this folder."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def worker(fake_path: None, tmp_path: Path) -> Iterator[Worker]:
    with Worker("fake", "fake_worker", python=sys.executable, threads=1, folder=tmp_path) as made:
        yield made
