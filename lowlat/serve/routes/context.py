"""Call: one request under way, and the generations it holds.

Owns that every generation ends with its request, however that ends, and the sums over them.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from lowlat.engine.params import SamplingParams
from lowlat.generate.grammar import CompiledGrammar
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.generation import Delta, Draining, Generation
from lowlat.serve.http.errors import GenerationFailed
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.state import Services


class Call:
    """One request of the key with `cache_namespace`, which has just arrived."""

    def __init__(self, services: Services, *, cache_namespace: bytes) -> None:
        self.services = services
        self._arrived_at = time.perf_counter()
        self.num_tokens = 0
        """Generated so far, by all completions."""
        self.form_field = "structured_outputs"
        """The field of the request that asks for the form of the answer, where one does."""
        self._num_completions = 0
        self._salt = cache_namespace
        self._generations: list[Generation] = []
        self._is_coming = True
        self._preparing: asyncio.Timeout | None = None
        services.num_coming += 1

    @contextlib.asynccontextmanager
    async def prepare(self, deadline: int | float | None) -> AsyncIterator[None]:
        """Give up where nothing has been submitted by the deadline, in seconds from arrival.

        From then on it is the engine's to keep. Raises RequestError 408.
        """
        waiting = asyncio.timeout(self._left(deadline))
        try:
            async with waiting as self._preparing:
                yield
        except TimeoutError as error:
            if waiting.expired():
                raise _late() from error
            raise
        finally:
            self._preparing = None

    def _left(self, deadline: int | float | None) -> float | None:
        """Seconds that are left of a deadline, or of the longest that the server allows."""
        longest = self.services.config.request_seconds
        limits = [seconds for seconds in (deadline, longest) if seconds is not None]
        if not limits:
            return None
        return max(0.0, min(limits) - (time.perf_counter() - self._arrived_at))

    async def compile(
        self, output: StructuredOutput, *, param: str, begins_text: bool = True
    ) -> CompiledGrammar:
        """The grammar of what the request's field `param` asks for; raises what `Grammars` do."""
        return await self.services.grammars.compile(
            output, param=param, cache_namespace=self._salt, begins_text=begins_text
        )

    async def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        priority: int | None = None,
        deadline: int | float | None = None,
        grammar: CompiledGrammar | None = None,
        keep_special: frozenset[int] = frozenset(),
        begins_text: bool = True,
    ) -> None:
        """Have `prompt` completed; `deadline` is in seconds from arrival. Raises what
        `AsyncEngine.submit` raises."""
        generation = await self.services.engine.submit(
            prompt,
            params,
            grammar=grammar,
            cache_namespace=self._salt,
            priority=priority or 0,
            deadline=self._left(deadline),
            keep_special=keep_special,
            begins_text=begins_text,
        )
        self._arrive()
        self._generations.append(generation)
        self._num_completions += params.n

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """(number of the prompt, what one of its completions gained), in the order of arrival.

        Raises RequestError 408 for a missed deadline and 400 for a form that was too much work,
        Draining where the server ends, GenerationFailed for a fault of the engine.
        """
        generations = self._generations
        several = len(generations) > 1
        merged = _merge(generations) if several else _number(generations[0])
        async with contextlib.aclosing(merged) as deltas:
            async for number, delta in deltas:
                _check_end(delta, self.form_field)
                self.num_tokens += len(delta.tokens)
                yield number, delta

    def close(self) -> None:
        """End what has not ended; the last call."""
        self._arrive()
        for generation in self._generations:
            generation.cancel()

    def _arrive(self) -> None:
        if self._is_coming:
            self._is_coming = False
            self.services.num_coming -= 1
        if self._preparing is not None and not self._preparing.expired():
            self._preparing.reschedule(None)

    @property
    def prompt_tokens(self) -> int:
        return sum(generation.prompt_tokens for generation in self._generations)

    @property
    def prefill_seconds(self) -> float:
        """From the first step of a prompt to its first token; the longest of them."""
        return max(generation.prefill_seconds for generation in self._generations)

    @property
    def decode_seconds(self) -> float:
        """From the first token to the last, of the completion that took longest."""
        return max(generation.decode_seconds for generation in self._generations)

    @property
    def tokens_per_second(self) -> float:
        """Tokens after each completion's first per second of decoding."""
        seconds, tokens = self.decode_seconds, self.num_tokens - self._num_completions
        return tokens / seconds if seconds > 0.0 and tokens > 0 else 0.0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose rows were in the cache already."""
        return sum(generation.cached_tokens for generation in self._generations)


async def _number(generation: Generation) -> AsyncGenerator[tuple[int, Delta], None]:
    async for delta in generation:
        yield 0, delta


async def _merge(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The deltas of all generations with their numbers, as they come."""
    iterators = [aiter(generation) for generation in generations]
    coming = {asyncio.ensure_future(anext(it, None)): i for i, it in enumerate(iterators)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = coming.pop(future)
                delta = future.result()
                if delta is not None:
                    coming[asyncio.ensure_future(anext(iterators[number], None))] = number
                    yield number, delta
    finally:
        for future in coming:
            future.cancel()


def _check_end(delta: Delta, form_field: str) -> None:
    match delta.finish_reason:
        case "deadline":
            raise _late()
        case "abort":
            raise Draining
        case "error" if delta.is_grammar_error:
            raise RequestError(f"{form_field}: {delta.error}", param=form_field)
        case "error":
            raise GenerationFailed(delta.error)
        case _:
            pass


def _late() -> RequestError:
    return RequestError(
        "the deadline passed before the answer was complete",
        param="deadline_seconds",
        code="deadline_exceeded",
        status=408,
    )
