"""Fake programs for benchmark runs."""

import os
from pathlib import Path

import pytest

from lowlat.peers import worker
from tests import forked

FOLDERS = (Path(__file__).parent, Path(__file__).parents[1] / "peers")


@pytest.fixture
def fake_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets workers import fake_calibration and fake_worker."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, FOLDERS)))


@pytest.fixture(autouse=True)
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.subprocess, "Popen", forked.Popen)
