"""Faults under the bridge: a request's own stays with it, the engine's own is told to everybody."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from lowlat.engine.engine import Engine
from lowlat.engine.grammar import CompiledGrammar, GrammarCompiler, GrammarState
from lowlat.engine.params import SamplingParams
from lowlat.engine.request import Chunk
from lowlat.engine.runner import Runner
from lowlat.engine.structured import Choice
from lowlat.serve import bridge as bridge_module
from lowlat.serve.bridge import Bridge
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import EngineDead
from lowlat.serve.run import open_socket, run
from lowlat.utils.errors import UserError

from .bridge_use import assert_nothing_is_left, collect, counting_model, until, with_bridge

POISON = 13
"""A byte whose request is made to fail."""


# Faults


def poison_model(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Runner.step

    def broken(self: Runner, chunks: list[Chunk]) -> tuple[Tensor, Tensor]:
        if any(POISON in chunk.tokens for chunk in chunks):
            raise RuntimeError("the model broke")
        return step(self, chunks)

    monkeypatch.setattr(Runner, "step", broken)


def poison_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Engine._advance

    def broken(self: Engine, sequence: Any, sampled: Any) -> Any:
        if POISON in sequence.request.prompt:
            raise RuntimeError("the sampler broke")
        return advance(self, sequence, sampled)

    monkeypatch.setattr(Engine, "_advance", broken)


def poison_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    push = bridge_module.CompletionBuilder.push

    def broken(self: Any, event: Any) -> None:
        if POISON in self.request.prompt:
            raise RuntimeError("the tokenizer broke")
        push(self, event)

    monkeypatch.setattr(bridge_module.CompletionBuilder, "push", broken)


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
def test_a_fault_ends_its_own_request_only(
    poison: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = counting_model()
    compiler = GrammarCompiler(model.tokenizer, vocab_size=model.config.vocab_size)
    poison(monkeypatch)
    is_grammar = poison in (poison_mask, poison_start)
    grammar = compiler.compile(Choice(options=("yes", "no"))) if is_grammar else None

    async def use(bridge: Bridge) -> None:
        params = SamplingParams(max_tokens=9)
        good = [await bridge.submit(b"abc", params) for _ in range(3)]
        bad = await bridge.submit(bytes([97, POISON]), params, grammar=grammar)
        good += [await bridge.submit(b"abc", params) for _ in range(3)]
        deltas = [delta async for delta in bad]
        assert deltas[-1].finish_reason == "error"
        assert deltas[-1].error is not None and "broke" in deltas[-1].error
        assert "\n" not in deltas[-1].error
        assert [await collect(one) for one in good] == [("defghijkl", ["length"])] * 6
        assert bridge.is_healthy

    assert_nothing_is_left(with_bridge(use, model))


def test_a_fault_of_the_engine_itself_is_told_to_everybody() -> None:
    """Holds shut: clients that wait for ever on a dead engine, and a /health that says ok."""
    model = counting_model()

    def broken() -> list[Any]:
        raise AssertionError("a page is lost")

    async def use(bridge: Bridge) -> None:
        first = await bridge.submit(b"abc", SamplingParams())
        await first.__aiter__().__anext__()
        assert bridge.is_healthy
        model.engine.scheduler.schedule = broken
        deltas = [delta async for delta in first]
        assert deltas[-1].finish_reason == "error"
        await until(lambda: not bridge.is_healthy)
        with pytest.raises(EngineDead):
            await bridge.submit(b"abc", SamplingParams())

    with_bridge(use, model)


def test_an_engine_that_stands_still_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "STALL_SECONDS", 0.05)
    released = threading.Event()
    model = counting_model()
    step = model.engine.step

    def held() -> list[Any]:
        released.wait()
        return step()

    async def use(bridge: Bridge) -> None:
        assert bridge.is_healthy
        model.engine.step = held
        generation = await bridge.submit(b"abc", SamplingParams(max_tokens=3))
        await until(lambda: not bridge.is_healthy)
        released.set()
        assert await collect(generation) == ("def", ["length"])
        await until(lambda: bridge.is_healthy)

    with_bridge(use, model)


def test_an_address_that_is_taken_meanwhile_is_told() -> None:
    """Holds shut: a traceback when another server began to listen while this one loaded."""
    with open_socket(ServeConfig(port=0)) as first:
        config = ServeConfig(port=first.getsockname()[1])
        with open_socket(config) as second:
            first.listen()
            with pytest.raises(UserError, match=r"cannot listen on .*; choose another"):
                run(Bridge(counting_model()), config, second)
