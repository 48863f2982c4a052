"""Terminal of `lowlat chat`: conversation, streamed answers, slash commands, Ctrl-C.

Answers go to stdout and everything else to stderr, so that a pipe carries answers only. The report
of --once is a result and goes to stdout.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType

from rich.console import Console

from lowlat.cli.chat_backend import ChatBackend, Message
from lowlat.generate.completion import Completion
from lowlat.generate.params import SamplingOptions
from lowlat.utils.errors import UserError

HELP = """\
/reset          start a new conversation
/system [TEXT]  set (without TEXT: remove) the system message and start a new conversation
/model          show the model
/help           show this list
/exit           exit (or Ctrl-D)
Ctrl-C          stop an answer"""

MAX_LINE = 2**24
"""Most characters of a line of piped input."""
# Terminals would execute escape sequences in an answer.
CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "�")
del CONTROL[ord("\n")], CONTROL[ord("\t")]


def printable(text: str) -> str:
    """`text` without control characters; unchanged if stdout is not a terminal."""
    return text.translate(CONTROL) if sys.stdout.isatty() else text


class Conversation:
    """The messages of a chat, and the sampling options of its answers."""

    def __init__(
        self,
        backend: ChatBackend,
        sampling: SamplingOptions,
        system: str | None = None,
        turns: Sequence[Message] = (),
        *,
        save: Callable[["Conversation"], None] = lambda conversation: None,
    ) -> None:
        self.backend = backend
        self.sampling = sampling
        self.system = system
        self.turns: list[Message] = list(turns)
        self._save = save
        """Called after each change."""

    def reset(self) -> None:
        """Remove all turns; the system message stays."""
        self.turns = []
        self._save(self)

    def ask(
        self, question: str, write: Callable[[str], None], interrupted: threading.Event
    ) -> Completion:
        """Stream the answer to `question` through `write`; `interrupted` ends it early.

        The answer, complete or not, becomes a turn. A question that raises UserError does not.
        """
        asked: Message = {"role": "user", "content": question}
        messages = [*self._system(), *self.turns, asked]
        completion = self.backend.answer(messages, self.sampling, write, interrupted)
        self.turns += [asked, {"role": "assistant", "content": completion.text}]
        self._save(self)
        return completion

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]


def answer_once(conversation: Conversation, question: str) -> None:
    """Print one answer, then the report."""
    completion = conversation.ask(question, write, threading.Event())
    print("\n")
    conversation.backend.report(completion, Console())


def talk(conversation: Conversation) -> None:
    """Chat until /exit or the end of the input."""
    console = Console(stderr=True, highlight=False)
    # A stray byte in piped text becomes U+FFFD instead of ending the conversation.
    sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # absent on Windows
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
    """Lines of input, stripped. Ctrl-C discards a line, Ctrl-D ends the input."""
    while True:
        try:
            yield (input(prompt) if prompt else _piped_line()).strip()
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /exit ends the chat", style="dim")


def _piped_line() -> str:
    """The next line of standard input. Raises EOFError at its end, UserError for a line without
    end."""
    line = sys.stdin.readline(MAX_LINE)
    if len(line) == MAX_LINE and not line.endswith("\n"):
        raise UserError(
            f"standard input: a line has more than {MAX_LINE:,} characters, the most that is read; "
            "shorten it"
        )
    if not line:
        raise EOFError
    return line


def command(conversation: Conversation, line: str, console: Console) -> None:
    name, _, rest = line.partition(" ")
    match name:
        case "/help":
            console.print(HELP, style="dim", markup=False)
        case "/reset":
            conversation.reset()
            console.print("new conversation", style="dim")
        case "/system":
            conversation.system = rest.strip() or None
            conversation.reset()
            console.print("system message " + ("set" if rest.strip() else "removed"), style="dim")
        case "/model":
            console.print(conversation.backend.description, style="dim", markup=False)
        case _:
            console.print(
                f"{name} is not a command; /help lists them", style="yellow", markup=False
            )


def turn(conversation: Conversation, question: str, console: Console, *, interactive: bool) -> None:
    """Print one answer and its statistics. An error ends the turn at a terminal, and the program
    otherwise.
    """
    try:
        with interruptions() as interrupted:
            completion = conversation.ask(question, write, interrupted)
    except UserError as error:
        if not interactive:
            raise
        console.print(f"{error}; /reset starts a new conversation", style="red", markup=False)
        return
    print(flush=True)  # before the statistics on stderr
    console.print(statistics(conversation, completion), style="dim", markup=False, soft_wrap=True)


def statistics(conversation: Conversation, completion: Completion) -> str:
    """Tokens, throughput and KV cache of an answer, as one line."""
    usage = completion.usage
    cached = usage.prompt_tokens + usage.completion_tokens
    per_token = conversation.backend.cache_bytes_per_token
    reasons = {"abort": " (stopped)", "length": " (token limit)"}
    ended = reasons.get(str(completion.finish_reason), "")
    if usage.prompt_tokens == 0:
        # A server sends usage last, so an interrupted answer has none.
        return f"no usage from the server{ended}"
    return (
        f"{usage.completion_tokens} tokens{ended}, "
        f"{usage.decode_tokens_per_second:.1f} tok/s; "
        f"prefill {usage.prompt_tokens} tokens in {usage.prefill_seconds:.2f} s"
        + (f"; KV cache {cached:,} x {per_token:,} bytes = {cached * per_token / 1e6:.1f} MB")
        * (per_token > 0)
    )


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, which stops an answer between tokens; a second one interrupts."""
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
    """Write a piece of an answer to stdout and flush."""
    print(piece.translate(CONTROL), end="", flush=True)
