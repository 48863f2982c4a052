"""A fake AsyncEngine: returns scripted outputs and records the submitted requests."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from lowlat.engine.request import FinishReason, LoRARequest, PoolingMode
from lowlat.engine.stats import DiskCacheStats, EngineStats, Histogram
from lowlat.generate.completion import CompletionDelta, TokenLogprob
from lowlat.generate.grammar import CompiledGrammar
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.generation import Generation, Overloaded
from lowlat.text.tokenizer import Tokenizer
from tests.fakes import byte_tokenizer, gqa_config, tiny_model

NAME = "tiny"


def tiny(tokenizer: Tokenizer | None = None, *, context: int = 97) -> Model:
    """A model named NAME; its engine is never asked."""
    tokenizer = tokenizer or byte_tokenizer()
    config = gqa_config(max_position_embeddings=context, vocab_size=tokenizer.vocab_size)
    return Model(tiny_model(config), tokenizer, name=NAME)


@dataclass(kw_only=True)
class Asked:
    """Arguments of one `submit`."""

    prompt: list[int]
    params: SamplingParams
    grammar: CompiledGrammar | None
    cache_namespace: bytes
    priority: int
    deadline: float | None
    keep_special: frozenset[int]
    begins_text: bool


@dataclass(kw_only=True)
class Answer:
    """The tokens (bytes) of each completion of a prompt, and how it ends."""

    text: str = "Hello"
    finish_reason: FinishReason = "stop"
    error: str | None = None
    is_grammar_error: bool = False
    hangs: bool = False
    """Whether nothing more comes after the text."""
    seconds: float = 0.0
    """Before each token."""


class FakeGeneration(Generation):
    def __init__(self, asked: Asked, answer: Answer) -> None:
        self.prompt = tuple(asked.prompt)
        self.cached_tokens = 3
        self.prefill_seconds = 0.25
        self.decode_seconds = 0.5
        self.prompt_logprobs = []
        self.is_cancelled = False
        self.is_finished = False
        self._asked = asked
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[CompletionDelta]:
        for number, byte in enumerate(self._answer.text.encode()):
            await asyncio.sleep(self._answer.seconds)
            for index in range(self._asked.params.n):
                yield self._delta(index, number, byte)
        if self._answer.hangs:
            await asyncio.Event().wait()
        for index in range(self._asked.params.n):
            yield CompletionDelta(
                index=index,
                text="",
                tokens=(),
                logprobs=(),
                finish_reason=self._answer.finish_reason,
                error=self._answer.error,
                is_grammar_error=self._answer.is_grammar_error,
            )
        self.is_finished = True

    def _delta(self, index: int, number: int, byte: int) -> CompletionDelta:
        data = self._answer.text.encode()
        # As the engine does: text comes with the last byte of a character.
        before = data[:number].decode(errors="ignore")
        text = data[: number + 1].decode(errors="ignore").removeprefix(before)
        logprobs = ()
        if self._asked.params.logprobs is not None:
            top = tuple((byte + i, -0.5 - i) for i in range(self._asked.params.logprobs))
            logprobs = (TokenLogprob(byte, -0.5, top, len(before)),)
        return CompletionDelta(
            index=index,
            text=text,
            tokens=(byte,),
            logprobs=logprobs,
            finish_reason=None,
            error=None,
        )

    def cancel(self) -> None:
        self.is_cancelled = True


@dataclass
class FakeEngine(AsyncEngine):
    """Gives `answer` to every prompt, or raises `refusal`."""

    model: Model = field(default_factory=tiny)
    answer: Answer = field(default_factory=Answer)
    refusal: Exception | None = None
    is_healthy: bool = True
    has_failed: bool = False
    asked: list[Asked] = field(default_factory=list)
    generations: list[FakeGeneration] = field(default_factory=list)
    drained: list[float] = field(default_factory=list)
    room: int = 1000
    max_queue: int = 1000
    num_preparing: int = 0
    """The last argument of `check_room`."""

    async def start(self) -> None:
        pass

    async def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        grammar: CompiledGrammar | None = None,
        cache_namespace: bytes = b"",
        priority: int = 0,
        deadline: float | None = None,
        prompt_logprobs: int | None = None,
        keep_special: frozenset[int] = frozenset(),
        begins_text: bool = True,
        pooling: PoolingMode | None = None,
        lora: LoRARequest | None = None,
    ) -> Generation:
        if self.refusal is not None:
            raise self.refusal
        asked = Asked(
            prompt=list(prompt),
            params=params,
            grammar=grammar,
            cache_namespace=cache_namespace,
            priority=priority,
            deadline=deadline,
            keep_special=keep_special,
            begins_text=begins_text,
        )
        self.asked.append(asked)
        self.generations.append(FakeGeneration(asked, self.answer))
        return self.generations[-1]

    def check_room(self, num_preparing: int = 0) -> None:
        self.num_preparing = num_preparing
        if num_preparing >= self.room:
            raise Overloaded(3)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        pass

    async def drain(self, seconds: float) -> None:
        self.drained.append(seconds)

    @property
    def stats(self) -> EngineStats:
        histogram = Histogram((0.1, 1.0), [2, 1, 1], 3.5)
        return EngineStats(
            queued=2,
            running=3,
            steps=11,
            prompt_tokens=100,
            cached_prompt_tokens=40,
            generated_tokens=70,
            preemptions=1,
            drafted_tokens=20,
            accepted_tokens=15,
            pages_total=50,
            pages_used=10,
            pages_cached=5,
            disk=DiskCacheStats(
                hit_tokens=64,
                read_bytes=900,
                written_bytes=800,
                evicted_bytes=700,
                dropped={"corrupt": 2},
            ),
            expert_loads={3: (5, 0, 8)},
            finished={"stop": 4, "length": 1},
            queue_time=histogram,
            ttft=histogram,
            itl=histogram,
            e2e=histogram,
        )
