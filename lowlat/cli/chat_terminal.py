"""The terminal side of `lowlat chat`: lines in, pieces of answers out, commands, Ctrl-C.

The conversation itself is `cli.conversation`'s. Answers go to stdout and everything about them to
stderr, so that a pipe carries answers only; the report of --once is a result and goes to stdout.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

from lowlat.cli.conversation import Conversation
from lowlat.generate.completion import Completion
from lowlat.utils.errors import UserError

HELP = """\
/reset          forget the conversation
/system [TEXT]  set the system message and start anew; without TEXT, remove it
/model          what is running
/help           this list
/exit           leave (so does Ctrl-D)
Ctrl-C          stop an answer"""

# Escape sequences in an answer would reach the terminal as commands.
CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
del CONTROL[ord("\n")], CONTROL[ord("\t")]


def printable(text: str) -> str:
    """`text` as it may be printed: as it is into a pipe or a file."""
    return text.translate(CONTROL) if sys.stdout.isatty() else text


def answer_once(conversation: Conversation, question: str) -> None:
    """One answer, then the report."""
    completion = conversation.ask(question, write, threading.Event())
    print("\n")
    conversation.backend.report(completion, Console())


def talk(conversation: Conversation) -> None:
    """Question and answer until /exit or the end of the input."""
    console = Console(stderr=True, highlight=False)
    # A stray byte in piped text becomes U+FFFD instead of ending the conversation.
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none; lines are then edited plainly
            import readline  # noqa: F401
        console.print(
            f"{conversation.backend.description}\n/help lists the commands",
            style="dim",
            markup=False,
        )
    for line in questions("> " if interactive else "", console):
        if line.startswith("/"):
            if line in ("/exit", "/quit"):
                break
            command(conversation, line, console)
        elif line:
            turn(conversation, line, console, interactive=interactive)


def questions(prompt: str, console: Console) -> Iterator[str]:
    """Lines as typed, without surrounding blanks. Ctrl-C drops a line, Ctrl-D ends them."""
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /exit leaves", style="dim")


def command(conversation: Conversation, line: str, console: Console) -> None:
    """Carry out a /command."""
    name, _, rest = line.partition(" ")
    match name:
        case "/help":
            console.print(HELP, style="dim", markup=False)
        case "/reset":
            conversation.reset()
            console.print("forgotten", style="dim")
        case "/system":
            conversation.system = rest.strip() or None
            conversation.reset()
            console.print("system message " + ("set" if rest.strip() else "removed"), style="dim")
        case "/model":
            console.print(conversation.backend.description, style="dim", markup=False)
        case _:
            console.print(f"{name} is no command; /help lists them", style="yellow", markup=False)


def turn(conversation: Conversation, question: str, console: Console, *, interactive: bool) -> None:
    """One answer, one line of figures. At a terminal a fault ends the turn, else the program."""
    try:
        with interruptions() as interrupted:
            completion = conversation.ask(question, write, interrupted)
    except UserError as error:
        if not interactive:
            raise
        console.print(f"{error}; /reset starts anew", style="red", markup=False)
        return
    print(flush=True)  # before the figures, which go to another file
    console.print(figures(conversation, completion), style="dim", markup=False, soft_wrap=True)


def figures(conversation: Conversation, completion: Completion) -> str:
    """Tokens, speed and cache of an answer, as one line."""
    usage = completion.usage
    cached = usage.prompt_tokens + usage.completion_tokens
    per_token = conversation.backend.cache_bytes_per_token
    reasons = {"abort": " (stopped)", "length": " (cut at the limit)"}
    ended = reasons.get(str(completion.finish_reason), "")
    if usage.prompt_tokens == 0:
        # Every prompt has tokens. A server tells its figures last, so one that is left does not.
        return f"no figures from the server{ended}"
    return (
        f"{usage.completion_tokens} tokens{ended}, "
        f"{usage.decode_tokens_per_second:.1f} tok/s; "
        f"prompt {usage.prompt_tokens} in {usage.prefill_seconds:.2f} s"
        + (f"; cache {cached:,} x {per_token:,} bytes = {cached * per_token / 1e6:.1f} MB")
        * (per_token > 0)
    )


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so an answer stops between two tokens; a second one interrupts."""
    pressed = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def write(piece: str) -> None:
    """A piece of an answer to stdout, at once."""
    print(piece.translate(CONTROL), end="", flush=True)
