"""A missing client is a skipped test on a developer's machine, and a failure in .ci/run."""

from pathlib import Path

import pytest

from .npm import REQUIRED, script

ROOT = Path(__file__).parents[2]


def test_a_missing_client_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(REQUIRED, raising=False)
    with pytest.raises(pytest.skip.Exception, match="npm ci"):
        script("none/none.js")


def test_a_missing_client_fails_where_it_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REQUIRED, "1")
    with pytest.raises(pytest.fail.Exception, match="npm ci"):
        script("none/none.js")


def test_the_checks_require_clients() -> None:
    assert f"export {REQUIRED}=1" in (ROOT / ".ci/run").read_text()
