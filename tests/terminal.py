"""A terminal in place of stderr."""

import io
import sys

import pytest


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def attach_terminal(monkeypatch: pytest.MonkeyPatch, columns: int = 100) -> FakeTerminal:
    """A terminal as stderr; called inside the test, since pytest sets stderr between its phases."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "24")
    fake = FakeTerminal()
    monkeypatch.setattr(sys, "stderr", fake)
    return fake
