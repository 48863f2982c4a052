"""What the trainer's tests share: a token folder, a teacher and its students."""

from pathlib import Path

import pytest

from . import recovering, runs


@pytest.fixture(scope="session")
def made_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_tokens(tmp_path_factory.mktemp("data") / "tokens")


@pytest.fixture
def base(made_tokens: Path, tmp_path: Path) -> Path:
    """A folder with the tokens in it, to be named `tokens` in recipes."""
    (tmp_path / "tokens").symlink_to(made_tokens)
    return tmp_path


@pytest.fixture(scope="session")
def teacher_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, its students and tokens; see `recovering`."""
    folder = tmp_path_factory.mktemp("healing")
    recovering.models(folder)
    return folder


@pytest.fixture
def teacher_folder(teacher_models: Path, tmp_path: Path) -> Path:
    """The same, with room for runs."""
    for entry in teacher_models.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path
