"""Failures under the engine: a request's error stays its own, an engine error reaches all
clients."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowlat.engine.engine import Engine
from lowlat.engine.request import Chunk
from lowlat.engine.request_table import RequestTable
from lowlat.engine.runner import ModelRunner
from lowlat.generate.completion import CompletionBuilder, CompletionDelta
from lowlat.generate.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from lowlat.generate.model import Model
from lowlat.generate.params import SamplingParams
from lowlat.generate.session import GenerationSession, TextRequest
from lowlat.generate.structured import Choice
from lowlat.serve import async_engine, watchdog
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import EngineDead, Generation
from lowlat.serve.run import open_socket, run
from lowlat.utils.errors import UserError

from .engine_use import (
    assert_nothing_is_left,
    before_each_step,
    collect,
    counting_model,
    until,
    with_engine,
)

POISON = 13
"""A byte whose request is made to fail."""


# Faults


def poison_model(monkeypatch: pytest.MonkeyPatch) -> None:
    step = ModelRunner.step

    def broken(self: ModelRunner, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        if any(POISON in chunk.tokens for chunk in chunks):
            raise RuntimeError("the model broke")
        return step(self, chunks)

    monkeypatch.setattr(ModelRunner, "step", broken)


def poison_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    append = RequestTable.append

    def broken(self: RequestTable, sequence: Any, *rest: Any) -> Any:
        if POISON in sequence.request.prompt:
            raise RuntimeError("the sampler broke")
        return append(self, sequence, *rest)

    monkeypatch.setattr(RequestTable, "append", broken)


def poison_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    push = CompletionBuilder.push

    def broken(self: Any, event: Any) -> None:
        if POISON in self.request.prompt:
            raise RuntimeError("the tokenizer broke")
        push(self, event)

    monkeypatch.setattr(CompletionBuilder, "push", broken)


def poison_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GrammarState) -> Tensor:
        raise RuntimeError("the grammar broke")

    monkeypatch.setattr(GrammarState, "mask", broken)


def poison_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: CompiledGrammar) -> GrammarState:
        raise RuntimeError("the grammar broke")

    monkeypatch.setattr(CompiledGrammar, "start", broken)


@pytest.mark.parametrize(
    "poison", [poison_model, poison_sampler, poison_tokenizer, poison_mask, poison_start]
)
def test_an_error_ends_its_own_request_only(
    poison: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = counting_model()
    compiler = GrammarCompiler(model.tokenizer, vocab_size=model.config.vocab_size)
    poison(monkeypatch)
    is_grammar = poison in (poison_mask, poison_start)
    grammar = compiler.compile(Choice(options=("yes", "no"))) if is_grammar else None

    async def use(engine: AsyncEngine) -> None:
        params = SamplingParams(max_tokens=9)
        good = [await engine.submit(b"abc", params) for _ in range(3)]
        bad = await engine.submit(bytes([97, POISON]), params, grammar=grammar)
        good += [await engine.submit(b"abc", params) for _ in range(3)]
        deltas = [delta async for delta in bad]
        assert deltas[-1].finish_reason == "error"
        assert deltas[-1].error is not None and "broke" in deltas[-1].error
        assert "\n" not in deltas[-1].error
        assert [await collect(one) for one in good] == [("defghijkl", ["length"])] * 6
        assert engine.is_healthy

    assert_nothing_is_left(with_engine(use, model))


def test_an_engine_error_reaches_every_client() -> None:
    """Regression: clients that wait forever on a dead engine, and a /health that reports ok."""
    model = counting_model()

    def broken() -> list[Any]:
        raise AssertionError("a page is lost")

    async def use(engine: AsyncEngine) -> None:
        first = await engine.submit(b"abc", SamplingParams())
        await first.__aiter__().__anext__()
        assert engine.is_healthy
        model.engine.scheduler.schedule = broken
        deltas = [delta async for delta in first]
        assert deltas[-1].finish_reason == "error"
        await until(lambda: not engine.is_healthy)
        with pytest.raises(EngineDead):
            await engine.submit(b"abc", SamplingParams())

    with_engine(use, model)


def test_an_engine_that_stands_still_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "STALL_SECONDS", 0.05)
    released = threading.Event()
    model = counting_model()

    async def use(engine: AsyncEngine) -> None:
        assert engine.is_healthy
        before_each_step(model, released.wait)
        generation = await engine.submit(b"abc", SamplingParams(max_tokens=3))
        await until(lambda: not engine.is_healthy)
        released.set()
        assert await collect(generation) == ("def", ["length"])
        await until(lambda: engine.is_healthy)

    with_engine(use, model)


def hold(kind: type, name: str, patch: pytest.MonkeyPatch) -> threading.Event:
    """Let a method wait for the event."""
    released, method = threading.Event(), getattr(kind, name)

    def held(self: Any, *args: Any) -> Any:
        released.wait(60.0)
        return method(self, *args)

    patch.setattr(kind, name, held)
    return released


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (Engine, "add"),
        (Engine, "step"),
        (Engine, "abort"),
        (Engine, "check_integrity"),
        (CompletionBuilder, "push"),
    ],
)
def test_a_thread_that_hangs_anywhere_is_not_healthy(
    kind: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a /health that looks at the model's step alone."""
    monkeypatch.setattr(async_engine, "STALL_SECONDS", 0.1)
    monkeypatch.setattr(async_engine, "CHECK_SECONDS", 0.05)
    monkeypatch.setattr(async_engine, "IDLE_SECONDS", 0.01)
    released = hold(kind, name, monkeypatch)

    async def use(engine: AsyncEngine) -> None:
        generation = await engine.submit(b"abc", SamplingParams(ignore_eos=True))
        if name in ("abort", "check_integrity"):
            await generation.__aiter__().__anext__()
            generation.cancel()
        await until(lambda: not engine.is_healthy)
        released.set()
        await until(lambda: engine.is_healthy)

    with_engine(use)


@pytest.mark.slow
def test_a_long_step_that_computes_is_healthy_until_it_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: a server taken out of service for reading a long prompt, and one that no longer
    notices a hang because a step was slow once."""
    monkeypatch.setattr(async_engine, "STALL_SECONDS", 1.5)
    monkeypatch.setattr(async_engine, "CHECK_SECONDS", 0.1)
    model = counting_model()
    hanging, released = threading.Event(), threading.Event()

    def compute_and_hang() -> None:
        end = time.monotonic() + 4.0
        while time.monotonic() < end:
            torch.ones(100, 100) @ torch.ones(100, 100)
        hanging.set()
        released.wait(60.0)

    async def use(engine: AsyncEngine) -> None:
        before_each_step(model, compute_and_hang)
        generation = await engine.submit(b"abc", SamplingParams(max_tokens=1))
        while not hanging.is_set():
            assert engine.is_healthy
            await asyncio.sleep(0.02)
        await until(lambda: not engine.is_healthy)
        released.set()
        assert await collect(generation) == ("d", ["length"])

    with_engine(use, model)


def test_a_step_that_computes_without_end_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_engine, "STALL_SECONDS", 0.2)
    monkeypatch.setattr(async_engine, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(watchdog, "LONGEST_STEP_SECONDS", 0.5)
    model = counting_model()
    released = threading.Event()

    def compute_until_released() -> None:
        while not released.is_set():
            pass

    async def use(engine: AsyncEngine) -> None:
        before_each_step(model, compute_until_released)
        generation = await engine.submit(b"abc", SamplingParams(max_tokens=1))
        await until(lambda: not engine.is_healthy)
        released.set()
        await collect(generation)

    with_engine(use, model)


# Nobody is left waiting when the engine ends


async def last_of(generation: Generation) -> CompletionDelta:
    deltas = await asyncio.wait_for(_all(generation), 60.0)
    return deltas[-1]


async def _all(generation: Generation) -> list[CompletionDelta]:
    return [delta async for delta in generation]


def test_a_request_that_comes_as_the_engine_ends_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Regression: the queue has a free place, the engine ends, and the queued request waits
    forever."""
    model = counting_model()

    def broken() -> list[Any]:
        raise AssertionError("a page is lost")

    async def use(engine: AsyncEngine) -> None:
        model.engine.step = broken
        first = await engine.submit(b"abc", SamplingParams())
        assert (await last_of(first)).finish_reason == "error"
        monkeypatch.setattr(engine, "check_room", lambda: None)
        with pytest.raises(EngineDead):
            await engine.submit(b"abc", SamplingParams())

    with_engine(use, model)


def test_deltas_before_the_engine_ended_are_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: ends that were on their way in the very turn in which the engine ends."""
    model = counting_model()
    add, advance = Engine.add, GenerationSession._advance

    def picky(self: Engine, prompt: Any, *rest: Any) -> Any:
        if POISON in prompt:
            raise RuntimeError("not this one")
        return add(self, prompt, *rest)

    def broken(self: GenerationSession, request: TextRequest, *rest: Any) -> Any:
        if request.request.prompt[0] == ord("x"):
            raise AssertionError("a page is lost")
        return advance(self, request, *rest)

    monkeypatch.setattr(Engine, "add", picky)
    monkeypatch.setattr(GenerationSession, "_advance", broken)
    lost: list[str] = []
    monkeypatch.setattr(Model, "lose", lambda self, reason: lost.append(reason))

    async def use(engine: AsyncEngine) -> None:
        with engine._wake:  # so that one turn takes in all three
            refused = await engine.submit(bytes([POISON]), SamplingParams(max_tokens=1))
            done = await engine.submit(b"abc", SamplingParams(max_tokens=1))
            last = await engine.submit(b"xyz", SamplingParams(max_tokens=1))
        assert "not this one" in ((await last_of(refused)).error or "")
        assert (await last_of(done)).finish_reason == "length"
        assert "the engine ended" in ((await last_of(last)).error or "")
        # other processes of its group would wait for the next step
        assert lost == ["the engine ended by AssertionError"]

    with_engine(use, model)


def test_an_address_that_is_taken_meanwhile_is_an_error() -> None:
    """Regression: a traceback when another server began to listen while this one loaded."""
    with open_socket(ServeConfig(port=0)) as first:
        config = ServeConfig(port=first.getsockname()[1])
        with open_socket(config) as second:
            first.listen()
            with pytest.raises(UserError, match=r"cannot listen on .*; choose another"):
                run(AsyncEngine(counting_model()), config, second)
