"""Chat backend of `lowlat chat`: the interface, and its implementation by a local model.

`chat_client` implements it by a server.
"""

import abc
import threading
from collections.abc import Callable, Sequence

from rich.console import Console

from lowlat.cli.answer_report import print_answer_report
from lowlat.generate.completion import Completion
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingOptions
from lowlat.utils.errors import UserError

Message = dict[str, str]


class ChatBackend(abc.ABC):
    """Answers chat messages."""

    @property
    @abc.abstractmethod
    def description(self) -> str:
        """The model in one line."""

    @property
    @abc.abstractmethod
    def cache_bytes_per_token(self) -> int: ...

    @abc.abstractmethod
    def answer(
        self,
        messages: Sequence[Message],
        sampling: SamplingOptions,
        max_tokens: int,
        write: Callable[[str], None],
        interrupted: threading.Event,
    ) -> Completion:
        """Stream an answer of at most `max_tokens` through `write`; `interrupted` ends it early.

        Raises UserError if the context is full or the backend fails.
        """

    @abc.abstractmethod
    def report(self, completion: Completion, console: Console) -> None:
        """Print model, KV cache and throughput of an answer."""


class LocalChatBackend(ChatBackend):
    """A loaded model. Raises UserError for one without a chat template."""

    def __init__(self, model: Model) -> None:
        if model.tokenizer.chat_template is None:
            raise UserError(
                f"{model.name} has no chat template, so it cannot chat; use lowlat generate"
            )
        self._model = model

    @property
    def description(self) -> str:
        return repr(self._model)

    @property
    def cache_bytes_per_token(self) -> int:
        return self._model.cache_bytes_per_token

    def answer(
        self,
        messages: Sequence[Message],
        sampling: SamplingOptions,
        max_tokens: int,
        write: Callable[[str], None],
        interrupted: threading.Event,
    ) -> Completion:
        capacity = max(1, self._model.context - len(self._model.encode_prompt(messages)))
        options: SamplingOptions = {**sampling, "max_tokens": min(max_tokens, capacity)}
        with self._model.generate(messages, stream=True, **options) as stream:
            for piece in stream:
                write(piece)
                if interrupted.is_set():
                    break
        return stream.completion

    def report(self, completion: Completion, console: Console) -> None:
        print_answer_report(self._model, completion, console)
