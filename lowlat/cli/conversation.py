"""A conversation: its messages, its sampling options, one answer at a time.

Knows nothing of terminals (text goes out through a function, an interruption comes in as an event)
and nothing of who answers.
"""

import threading
from collections.abc import Callable

from lowlat.cli.chat_backend import ChatBackend, Message
from lowlat.engine.params import SamplingOptions
from lowlat.generate.completion import Completion


class Conversation:
    """Turns of a user and a backend."""

    def __init__(
        self,
        backend: ChatBackend,
        sampling: SamplingOptions,
        *,
        max_tokens: int,
        system: str | None = None,
    ) -> None:
        self.backend = backend
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.system = system
        self.turns: list[Message] = []

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns = []

    def ask(
        self, question: str, write: Callable[[str], None], interrupted: threading.Event
    ) -> Completion:
        """The answer to `question`, written piece by piece; `interrupted` ends it early.

        The answer, whole or cut, joins the conversation. A question that raises UserError does not.
        """
        asked: Message = {"role": "user", "content": question}
        messages = [*self._system(), *self.turns, asked]
        completion = self.backend.answer(
            messages, self.sampling, self.max_tokens, write, interrupted
        )
        self.turns += [asked, {"role": "assistant", "content": completion.text}]
        return completion

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]
