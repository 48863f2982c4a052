"""A conversation with a model: its messages, its sampling options, one answer at a time.

Knows nothing of terminals: text goes out through a function, an interruption comes in as an event.
"""

import threading
from collections.abc import Callable

from lowlat.engine.completion import Completion
from lowlat.engine.llm import Model
from lowlat.engine.params import SamplingOptions
from lowlat.utils.errors import UserError

Message = dict[str, str]


class Conversation:
    """Turns of a user and a model. Raises UserError for a model without a chat template."""

    def __init__(
        self, model: Model, sampling: SamplingOptions, *, max_tokens: int, system: str | None = None
    ) -> None:
        if model.tokenizer.chat_template is None:
            raise UserError(
                f"{model.name} has no chat template, so it cannot chat; "
                "use lowlat generate, which continues a text"
            )
        self.model = model
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
        prompt = self.model.encode_prompt([*self._system(), *self.turns, asked])
        room = max(1, self.model.context - len(prompt))
        options: SamplingOptions = {**self.sampling, "max_tokens": min(self.max_tokens, room)}
        with self.model.generate(prompt, stream=True, **options) as stream:
            for piece in stream:
                write(piece)
                if interrupted.is_set():
                    break
        self.turns += [asked, {"role": "assistant", "content": stream.text}]
        return stream.completion

    def _system(self) -> list[Message]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]
