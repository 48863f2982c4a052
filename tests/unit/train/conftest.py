"""What the trainer's tests share: a token folder, and no time spent on measuring the machine."""

from pathlib import Path

import pytest

from lowlat.train.plan import rate

from . import runs


@pytest.fixture(scope="session")
def made_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture
def base(made_tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the tokens in it, to be named `tokens` in recipes."""
    monkeypatch.setitem(rate.SIDES, "cpu", 64)
    (tmp_path / "tokens").symlink_to(made_tokens)
    return tmp_path
