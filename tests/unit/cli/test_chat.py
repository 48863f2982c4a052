"""lowlat chat: turns, commands, interruption and the report."""

import signal
import sys
import threading
from collections.abc import Callable

import pytest
from typer.testing import Result

from lowlat.cli.chat_backend import LocalChatBackend
from lowlat.cli.chat_terminal import Conversation, interruptions, printable, write
from lowlat.generate.model import Model
from lowlat.utils.errors import UserError

Invoke = Callable[..., Result]
GREEDY = ("--temperature", "0", "--max-tokens", "4")


def ask(conversation: Conversation, question: str) -> str:
    pieces: list[str] = []
    conversation.ask(question, pieces.append, threading.Event())
    return "".join(pieces)


def test_a_pipe_carries_answers_only(lowlat: Invoke) -> None:
    result = lowlat("chat", "tiny", *GREEDY, stdin="one\n\ntwo\n")
    assert result.exit_code == 0
    assert result.stdout == "abcd\nabcd\n"
    assert "4 tokens (token limit)" in result.stderr
    assert "bytes" in result.stderr


def test_commands(lowlat: Invoke) -> None:
    lines = "/help\n/system be kind\n/model\n/nonsense\n/reset\n/exit\nnot read\n"
    result = lowlat("chat", "tiny", *GREEDY, stdin=lines)
    assert result.exit_code == 0
    assert result.stdout == ""
    for words in (
        "/reset",
        "system message set",
        "tiny",
        "/nonsense is not a command",
        "new conversation",
    ):
        assert words in result.stderr


def test_once_prints_answer_and_report(lowlat: Invoke) -> None:
    result = lowlat("chat", "tiny", *GREEDY, "--once", "hello")
    assert result.stdout.startswith("abcd\n\nmodel")
    for words in ("GQA, 6 heads in 3 groups of 10", "cache per token", "480 bytes", "tok/s"):
        assert words in result.stdout


def test_turns_are_remembered_and_forgotten(alphabet_model: Model) -> None:
    talk = Conversation(
        LocalChatBackend(alphabet_model), {"temperature": 0.0, "max_tokens": 2}, system="S"
    )
    assert ask(talk, "one") == "ab"
    assert ask(talk, "two") == "ab"
    assert [turn["content"] for turn in talk.turns] == ["one", "ab", "two", "ab"]
    talk.reset()
    assert talk.turns == [] and talk.system == "S"


def test_interruption_keeps_the_part_that_came(alphabet_model: Model) -> None:
    talk = Conversation(LocalChatBackend(alphabet_model), {"temperature": 0.0, "max_tokens": 50})
    interrupted = threading.Event()
    seen: list[str] = []

    def stop_after_three(piece: str) -> None:
        seen.append(piece)
        if len(seen) == 3:
            interrupted.set()

    completion = talk.ask("one", stop_after_three, interrupted)
    assert completion.finish_reason == "abort"
    assert talk.turns[-1] == {"role": "assistant", "content": "abc"}
    assert ask(talk, "again").startswith("ab")


def test_an_answer_ends_where_the_context_does(alphabet_model: Model) -> None:
    """Regression: a limit of tokens that no longer fits made the last turns fail."""
    talk = Conversation(
        LocalChatBackend(alphabet_model), {"temperature": 0.0, "max_tokens": 10_000}
    )
    completion = talk.ask("one", lambda piece: None, threading.Event())
    assert completion.finish_reason == "length"
    usage = completion.usage
    assert usage.prompt_tokens + usage.completion_tokens == alphabet_model.context


def test_a_question_beyond_the_context_leaves_the_conversation_as_it_was(
    alphabet_model: Model,
) -> None:
    talk = Conversation(LocalChatBackend(alphabet_model), {"temperature": 0.0, "max_tokens": 2})
    ask(talk, "one")
    with pytest.raises(UserError, match="context"):
        ask(talk, "x" * 500)
    assert len(talk.turns) == 2


def test_first_interrupt_is_an_event_and_the_second_one_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptions() as pressed:
        assert not pressed.is_set()
        signal.raise_signal(signal.SIGINT)
        assert pressed.is_set()
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_escape_sequences_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    write("a\x1b[2Jb\n\tc")
    assert capsys.readouterr().out == "a�[2Jb\n\tc"


def test_what_goes_into_a_pipe_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for is_terminal, shown in ((True, "a�[2Jb\n"), (False, "a\x1b[2Jb\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        assert printable("a\x1b[2Jb\n") == shown
