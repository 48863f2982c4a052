"""RequestContext: one active API request and its generations in the engine.

Cancels every generation when the request ends, however it ends, and sums up tokens and times.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from lowlat.engine.prompt_logprobs import PromptLogprob
from lowlat.engine.request import PoolingMode
from lowlat.generate.completion import CompletionDelta
from lowlat.generate.grammar import CompiledGrammar
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.generate.structured import StructuredOutput
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.generation import Draining, Generation
from lowlat.serve.http.errors import GenerationFailed
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.served_model import LoadedModel, ServedModel
from lowlat.serve.state import ServerState


class RequestContext:
    """One request whose body has arrived. `cache_namespace` isolates the prefix cache of its key;
    `owner`: its key, or the client's address without one; `arrived_at`: when its headers arrived,
    by time.perf_counter, by default now.
    """

    def __init__(
        self,
        state: ServerState,
        *,
        cache_namespace: bytes,
        owner: str = "",
        arrived_at: float | None = None,
    ) -> None:
        self.state = state
        self._owner = owner
        self._arrived_at = time.perf_counter() if arrived_at is None else arrived_at
        self.num_tokens = 0
        """Tokens generated so far, by all completions."""
        self.priority = 0
        self.deadline: int | float | None = None
        """Seconds from arrival; None: the server's maximum."""
        self.ignored: set[str] = set()
        """Paths of the request's hints that have no effect."""
        self.constraint_field = ""
        """The request field that constrains the output, for errors of its grammar."""
        self._served: ServedModel | None = None
        self._adapter: str | None = None
        self._loaded: LoadedModel | None = None
        self._num_completions = 0
        self.cache_namespace = cache_namespace
        self._generations: list[Generation] = []
        self._is_preparing = True
        self._preparing: asyncio.Timeout | None = None
        self._counter: ServerState | ServedModel = state
        """What counts the request until it is submitted."""
        state.num_preparing += 1

    def find_model(self, name: str) -> None:
        """Set the model of the request, and its LoRA adapter. Raises RequestError 404 for an
        unknown name."""
        self._served = self.state.models.find(name)
        self._adapter = name if name in self._served.adapters else None

    async def load_model(self) -> None:
        """Have the model in memory until the request ends. Raises as `ServedModel.check_room` and
        `ModelRegistry.acquire`."""
        self.state.models.check_model(self.served)
        self._counter.num_preparing -= 1
        self._counter = self.served
        self._counter.num_preparing += 1
        self._loaded = await self.state.models.acquire(self.served)

    @property
    def served(self) -> ServedModel:
        """The request's model."""
        assert self._served is not None
        return self._served

    @property
    def loaded(self) -> LoadedModel:
        assert self._loaded is not None
        return self._loaded

    @property
    def engine(self) -> AsyncEngine:
        return self.loaded.engine

    @property
    def model(self) -> Model:
        return self.loaded.model

    @property
    def model_name(self) -> str:
        """Its name, not an alias, or that of the adapter."""
        return self._adapter or self.served.name

    @contextlib.asynccontextmanager
    async def prepare(self) -> AsyncIterator[None]:
        """Enforce the deadline until `submit`; then the engine does. Raises RequestError 408."""
        waiting = asyncio.timeout(self._left())
        try:
            async with waiting as self._preparing:
                yield
        except TimeoutError as error:
            if waiting.expired():
                raise _late() from error
            raise
        finally:
            self._preparing = None

    def _left(self) -> float | None:
        """Seconds left of the deadline or of the server's maximum; None: no limit."""
        longest = self.state.config.request_seconds
        limits = [seconds for seconds in (self.deadline, longest) if seconds is not None]
        if not limits:
            return None
        return max(0.0, min(limits) - (time.perf_counter() - self._arrived_at))

    async def compile(
        self, output: StructuredOutput, *, param: str, begins_text: bool = True
    ) -> CompiledGrammar:
        """Compile the grammar of the field `param`.

        Raises as `StructuredOutputManager.compile` does.
        """
        self.constraint_field = param
        return await self.loaded.structured_outputs.compile(
            output,
            param=param,
            owner=self._owner,
            cache_namespace=self.cache_namespace,
            begins_text=begins_text,
        )

    async def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        grammar: CompiledGrammar | None = None,
        prompt_logprobs: int | None = None,
        keep_special: frozenset[int] = frozenset(),
        begins_text: bool = True,
        pooling: PoolingMode | None = None,
    ) -> Generation:
        """Submit `prompt` to the engine. Raises as the engine's `submit` does."""
        if pooling is None and self.model.pooling is not None:
            raise RequestError(
                f"the model '{self.model_name}' is an embedding model and generates no text;"
                " use /v1/embeddings",
                param="model",
            )
        generation = await self.engine.submit(
            prompt,
            params,
            grammar=grammar,
            cache_namespace=self.cache_namespace,
            priority=self.priority,
            deadline=self._left(),
            prompt_logprobs=prompt_logprobs,
            keep_special=keep_special,
            begins_text=begins_text,
            pooling=pooling,
            lora=self.model.adapters.get(self._adapter),
        )
        self._end_preparation()
        self._generations.append(generation)
        self._num_completions += params.n
        return generation

    async def deltas(self) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
        """Yield (index of the prompt, delta of one of its completions) as they arrive.

        Raises RequestError 408 for a missed deadline and 400 for a grammar that exceeds its
        limits, Draining at shutdown, GenerationFailed for an engine error.
        """
        generations = self._generations
        several = len(generations) > 1
        merged = _merge(generations) if several else _number(generations[0])
        async with contextlib.aclosing(merged) as deltas:
            async for number, delta in deltas:
                _check_end(delta, self.constraint_field)
                self.num_tokens += len(delta.tokens)
                yield number, delta

    async def embedding(self, generation: Generation) -> tuple[float, ...]:
        """The pooled hidden states of a prompt submitted with pooling. Raises as `deltas` does."""
        async for delta in generation:
            _check_end(delta, self.constraint_field)
            if delta.embedding is not None:
                return delta.embedding
        raise GenerationFailed("a prompt has no embedding")

    def close(self) -> None:
        """Cancel what has not finished; call it last."""
        self._end_preparation()
        for generation in self._generations:
            generation.cancel()
        if self._loaded is not None:
            self.state.models.release(self.served)

    def log_fields(self) -> dict[str, object]:
        """Token counts and timings of what the engine has done, for the line in the log."""
        if not self._generations:
            return {}
        return {
            "model": self.model_name,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.num_tokens,
            "prefill_seconds": round(self.prefill_seconds, 4),
            "decode_seconds": round(self.decode_seconds, 4),
        }

    def _end_preparation(self) -> None:
        if self._is_preparing:
            self._is_preparing = False
            self._counter.num_preparing -= 1
        if self._preparing is not None and not self._preparing.expired():
            self._preparing.reschedule(None)

    def prompt(self, number: int) -> tuple[int, ...]:
        """Token ids of a prompt."""
        return self._generations[number].prompt

    def prompt_logprobs(self, number: int) -> Sequence[PromptLogprob]:
        """Log-probabilities of a prompt's tokens but the first, once it has completed."""
        return self._generations[number].prompt_logprobs

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether the response may be large by them."""
        return any(generation.prompt_logprobs for generation in self._generations)

    @property
    def seconds(self) -> float:
        """Time since the request arrived."""
        return time.perf_counter() - self._arrived_at

    @property
    def prompt_tokens(self) -> int:
        return sum(generation.prompt_tokens for generation in self._generations)

    @property
    def prefill_seconds(self) -> float:
        """Time from a prompt's first step to its first token; the maximum over prompts."""
        return max(generation.prefill_seconds for generation in self._generations)

    @property
    def decode_seconds(self) -> float:
        """Time from the first token to the last; the maximum over completions."""
        return max(generation.decode_seconds for generation in self._generations)

    @property
    def tokens_per_second(self) -> float:
        """Decode throughput: tokens after each completion's first, per second."""
        seconds, tokens = self.decode_seconds, self.num_tokens - self._num_completions
        return tokens / seconds if seconds > 0.0 and tokens > 0 else 0.0

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache."""
        return sum(generation.cached_tokens for generation in self._generations)


async def _number(generation: Generation) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
    async for delta in generation:
        yield 0, delta


async def _merge(
    generations: Sequence[Generation],
) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
    """The deltas of all generations with their indexes, as they arrive."""
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


def _check_end(delta: CompletionDelta, constraint_field: str) -> None:
    match delta.finish_reason:
        case "deadline":
            raise _late()
        case "abort":
            raise Draining
        case "error" if delta.is_grammar_error:
            raise RequestError(f"{constraint_field}: {delta.error}", param=constraint_field)
        case "error":
            raise GenerationFailed(delta.error)
        case _:
            pass


def _late() -> RequestError:
    return RequestError(
        "the deadline passed before the response was complete; raise deadline_seconds",
        param="deadline_seconds",
        code="deadline_exceeded",
        status=408,
    )
