"""lowlat chat --session: kept conversations, their cache on disk, listing and deleting."""

import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lowlat.cli.chat_session import delete_session, list_sessions, open_session
from lowlat.cli.main import app
from lowlat.generate.model import Model
from lowlat.utils.errors import UserError
from tests import forked
from tests.fakes import byte_tokenizer, gqa_config, tiny_model

Invoke = Callable[..., Result]
LONG = "tell me a story " * 12
GREEDY = ("--temperature", "0", "--max-tokens", "6")


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where sessions lie."""
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    return tmp_path / "sessions"


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Model]]:
    """A real tiny model is loaded for every name, anew each time: the names and models so far."""
    models: list[tuple[str, Model]] = []

    def load(name: str, **options: Any) -> Model:
        disk = {key: value for key, value in options.items() if key.startswith("prefix_cache")}
        config = gqa_config(max_position_embeddings=999)
        model = Model(tiny_model(config), byte_tokenizer(), name=name, **disk)
        models.append((name, model))
        return model

    monkeypatch.setattr("lowlat.api.load", load)
    return models


def chat(*arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(app, ["chat", *arguments], input=stdin)


def hits(model: Model) -> int:
    disk = model.engine.disk
    return 0 if disk is None else disk.recorder.snapshot().hit_tokens


def test_a_session_is_resumed_with_its_cache(root: Path, loaded: list[tuple[str, Model]]) -> None:
    whole = chat("tiny", *GREEDY, stdin=f"{LONG}\nand then?\n")
    first = chat("tiny", *GREEDY, "--session", "a", stdin=f"{LONG}\n")
    assert first.exit_code == 0, first.output
    loaded[-1][1].close()  # as the end of the program does: writes the pages
    second = chat(*GREEDY, "--session", "a", stdin="and then?\n")
    assert second.exit_code == 0, second.output
    assert first.stdout + second.stdout == whole.stdout
    assert "resuming session 'a', 2 messages" in second.stderr
    assert [name for name, _ in loaded] == ["tiny"] * 3
    assert [hits(model) for _, model in loaded] == [0, 0, 192]
    stored = json.loads((root / "a/conversation.json").read_text())
    assert [turn["role"] for turn in stored["turns"]] == ["user", "assistant"] * 2


def test_sessions_are_private(root: Path, loaded: list[tuple[str, Model]]) -> None:
    chat("tiny", *GREEDY, "--session", "a", "--once", LONG)
    loaded[-1][1].close()  # as the end of the program does: writes the pages
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o700
    files = [path for path in (root / "a").rglob("*") if path.is_file()]
    assert (root / "a/conversation.json") in files and len(files) > 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_reset_and_system_are_kept(root: Path, loaded: list[tuple[str, Model]]) -> None:
    chat("tiny", *GREEDY, "--session", "a", "--system", "be kind", stdin="one\ntwo\n")
    with open_session("a") as session:
        assert (session.system, len(session.turns), session.model) == ("be kind", 4, "tiny")
    refused = chat("tiny", *GREEDY, "--session", "a", "--system", "be terse", stdin="x\n")
    assert isinstance(refused.exception, UserError)
    assert "--system differs" in str(refused.exception)
    chat("tiny", "--session", "a", stdin="/reset\n")
    with open_session("a") as session:
        assert (session.system, session.turns) == ("be kind", [])


def test_list_and_delete(root: Path, loaded: list[tuple[str, Model]]) -> None:
    assert "no sessions" in chat("sessions").stdout
    for name in ("one", "two"):
        chat("tiny", *GREEDY, "--session", name, "--once", LONG)
        loaded[-1][1].close()  # as the end of the program does: writes the pages
    os.utime(root / "one/conversation.json", (0, 0))
    listed = json.loads(chat("sessions", "--json").stdout)["sessions"]
    assert [(row["name"], row["messages"]) for row in listed] == [("two", 2), ("one", 2)]
    assert all(row["bytes"] > 1000 for row in listed)
    assert "one" in chat("sessions").stdout
    assert "deleted session 'one'" in chat("delete", "one").stdout
    assert [session.name for session in list_sessions()] == ["two"]
    assert not (root / "one").exists()


@pytest.mark.parametrize("name", ["", "../x", ".hidden", "a/b", "x" * 65])
def test_names_cannot_leave_the_folder(root: Path, name: str) -> None:
    with pytest.raises(UserError, match="--session"), open_session(name):
        pass


def test_what_cannot_be_opened_is_refused(root: Path) -> None:
    with open_session("a"):
        with pytest.raises(UserError, match="another process"), open_session("a"):
            pass
        with pytest.raises(UserError, match="another process"):
            delete_session("a")
    with pytest.raises(UserError, match="no session"):
        delete_session("b")
    for content in ("", "[]", '{"model": 1}', '{"model": "m", "system": null, "turns": [1]}'):
        (root / "a/conversation.json").write_text(content)
        with pytest.raises(UserError, match="lowlat chat delete a"), open_session("a"):
            pass
    delete_session("a")


@pytest.mark.slow
def test_another_process_resumes(root: Path) -> None:
    def ask(question: str, *options: str) -> str:
        command = [sys.executable, "-m", "lowlat", "chat", "minnow", *GREEDY, *options]
        run = forked.run(
            command, input=question, capture_output=True, text=True, timeout=120, check=True
        )
        return run.stdout

    expected = ask(f"{LONG}\nand then?\n")
    found = [ask(f"{text}\n", "--session", "a") for text in (LONG, "and then?")]
    assert "".join(found) == expected
    assert list((root / "a/pages").glob("*/*/*"))
