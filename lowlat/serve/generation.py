"""One admitted request on the event loop's side: its deltas, its end, and refusals.

Owns the records between the event loop and the engine's thread; `serve.async_engine` fills them.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence

from lowlat.engine.prompt_logprobs import PromptLogprob
from lowlat.engine.request import FinishReason, RequestOptions
from lowlat.generate.completion import CompletionDelta
from lowlat.generate.params import SamplingParams
from lowlat.generate.session import TextRequest, end_delta


class Overloaded(Exception):
    """The queue of requests is full."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after} s")
        self.retry_after = retry_after
        """Seconds after which the queue may have a free place."""


class Draining(Exception):
    """The server shuts down and takes no requests."""


class EngineDead(Exception):
    """The engine's thread has ended by an error."""


class ModelUnavailable(Exception):
    """A model that is not in memory now: it loads for long, has failed, or does not fit."""

    def __init__(self, message: str, *, code: str, retry_after: int | float = 60) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = math.ceil(retry_after)
        """Seconds after which a request may succeed."""


class Generation:
    """One admitted request, on the event loop's side. Iterate it to its end, or cancel it."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        options: RequestOptions,
        *,
        keep_special: frozenset[int],
        begins_text: bool,
        cancel: Callable[["Generation"], None],
    ) -> None:
        self.prompt = tuple(prompt)
        self.params = params
        self.options = options
        self.keep_special = keep_special
        self.begins_text = begins_text
        self.request: TextRequest | None = None
        """The request in the engine; used by the engine's thread."""
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache; known from the first delta on."""
        self.prefill_seconds = 0.0
        """From the first step of the prompt to the first token."""
        self.decode_seconds = 0.0
        """From the first token to the last, of the completion that took longest."""
        self.prompt_logprobs: Sequence[PromptLogprob] = ()
        """Those that the options ask for; complete from the first delta on."""
        self._cancel = cancel
        self._deltas: asyncio.Queue[CompletionDelta] = asyncio.Queue()
        self._num_open = params.n

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    async def __aiter__(self) -> AsyncIterator[CompletionDelta]:
        """Deltas of all n completions as they come, until the last completion has ended."""
        while self._num_open > 0:
            delta = await self._deltas.get()
            if delta.finish_reason is not None:
                self._num_open -= 1
            yield delta

    def cancel(self) -> None:
        """Cancel the unfinished completions."""
        self._cancel(self)

    def put(self, delta: CompletionDelta) -> None:
        """Add a delta; AsyncEngine calls it on the event loop."""
        self._deltas.put_nowait(delta)


def ends_of(
    generation: Generation, reason: FinishReason, error: str | None
) -> list[tuple[Generation, CompletionDelta]]:
    """The ends of all completions of a request that never ran."""
    indices = range(generation.params.n)
    return [(generation, end_delta(index, reason, error)) for index in indices]
