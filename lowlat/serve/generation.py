"""One admitted request as the event loop sees it: its deltas, its end, and why there may be none.

Owns the records between the two threads. Who fills them is engine.py.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

from lowlat.engine.params import SamplingParams
from lowlat.engine.request import FinishReason, RequestOptions
from lowlat.generate.completion import TokenLogprob


class Overloaded(Exception):
    """So many requests wait that another is refused."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many requests wait; try again in {retry_after} s")
        self.retry_after = retry_after
        """Seconds after which there may be room."""


class Draining(Exception):
    """The server is ending and takes no requests."""


class EngineDead(Exception):
    """The engine's thread has ended by a fault of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """What one completion gained in one step."""

    index: int
    """Which of the request's n completions."""
    text: str
    """Certain text: whole characters, without the stop string that ended it."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    """Where asked for, one per token that begins within the text so far and was not told before."""
    finish_reason: FinishReason | None
    error: str | None
    """With finish_reason "error": what failed, in one line."""
    is_grammar_error: bool = False
    """With an error: whether the form that was asked for is at fault, and nothing of ours."""


class Generation:
    """One admitted request, on the event loop's side. Iterate it to its end or cancel it."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        options: RequestOptions,
        keep_special: frozenset[int],
        cancel: Callable[["Generation"], None],
    ) -> None:
        self.prompt = tuple(prompt)
        self.params = params
        self.options = options
        self.keep_special = keep_special
        self.cached_tokens = 0
        """Tokens of the prompt found in the prefix cache; known from the first delta on."""
        self.prefill_seconds = 0.0
        """From the first step of the prompt to the first token."""
        self.decode_seconds = 0.0
        """From the first token to the last, of the completion that took longest."""
        self.queue_seconds = 0.0
        """From arrival to the first step."""
        self._cancel = cancel
        self._deltas: asyncio.Queue[Delta] = asyncio.Queue()
        self._num_open = params.n

    @property
    def prompt_tokens(self) -> int:
        return len(self.prompt)

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas of all n completions as they come, to the last one's end."""
        while self._num_open > 0:
            delta = await self._deltas.get()
            if delta.finish_reason is not None:
                self._num_open -= 1
            yield delta

    def cancel(self) -> None:
        """Give up what has not ended."""
        self._cancel(self)

    def put(self, delta: Delta) -> None:
        """For the engine: hand over a delta, on the event loop."""
        self._deltas.put_nowait(delta)


def end_of(index: int, reason: FinishReason, error: str | None) -> Delta:
    """The end of a completion that comes without a token."""
    return Delta(index=index, text="", tokens=(), logprobs=(), finish_reason=reason, error=error)


def ends_of(
    generation: Generation, reason: FinishReason, error: str | None
) -> list[tuple[Generation, Delta]]:
    """The ends of all completions of a request that never ran."""
    return [(generation, end_of(index, reason, error)) for index in range(generation.params.n)]
