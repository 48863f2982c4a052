"""The memory budget of compiled grammars."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from lowlat.generate.grammar import GrammarCompiler
from lowlat.generate.model import Model
from lowlat.generate.structured import Choice, Regex
from lowlat.serve.app import build_app, make_state
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Overloaded
from lowlat.serve.state import ServerState
from lowlat.serve.structured_outputs import MIN_GRAMMAR_BYTES, MemoryBudget, StructuredOutputManager
from tests.fakes import byte_tokenizer, gqa_config, tiny_model

from .conftest import MakeClient
from .fake_engine import FakeEngine

SMALL = Regex(pattern="a")
LARGE = Choice(options=tuple(f"{number:03}" * 20 for number in range(1000)))


class Thing:
    pass


def test_sizes_are_counted() -> None:
    tokenizer = byte_tokenizer()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    sizes = [compiler.compile(form).num_bytes for form in (SMALL, LARGE)]
    assert 0 < sizes[0] < sizes[1] / 4 < 16 << 20
    assert compiler.compile(LARGE).num_bytes == sizes[1], "as when it was tried"


def test_grammars_count_while_referenced() -> None:
    held = MemoryBudget(10)
    first, second = Thing(), Thing()
    held.hold(b"", first, 6)
    with pytest.raises(Overloaded):
        held.hold(b"", second, 5)
    assert held.total() == 6
    held.hold(b"", second, 4)
    del first
    assert held.total() == 4
    held.check(b"", 6)


def test_one_key_leaves_half_to_the_others() -> None:
    """Regression: a key whose large forms keep every other key's from being compiled."""
    held = MemoryBudget(10)
    things = [Thing() for _ in range(3)]
    held.hold(b"one", things[0], 5)
    with pytest.raises(Overloaded):
        held.check(b"one", 1)
    held.hold(b"two", things[1], 4)
    with pytest.raises(Overloaded):
        held.check(b"two", 2)
    held.hold(b"two", things[2], 1)


def test_grammars_of_all_requests_share_a_budget(engine: FakeEngine) -> None:
    """Regression: forms that each are small enough, and together take all memory."""

    async def ask() -> None:
        grammars = StructuredOutputManager(
            engine.model, max_waiting=4, budget=MemoryBudget(9 * MIN_GRAMMAR_BYTES)
        )
        held = []
        with pytest.raises(Overloaded):
            for _ in range(99):
                held.append(await grammars.compile(LARGE, param="x"))
        assert 1 <= len(held) <= 8
        held.append(await grammars.compile(SMALL, param="x"))
        held.clear()
        await grammars.compile(LARGE, param="x")
        grammars.close()

    asyncio.run(ask())


def test_a_grammar_does_not_wait_for_those_of_another_key(
    make_client: MakeClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: one queue for all API keys."""
    hard, is_released, begun = "a+", threading.Event(), []
    compile = StructuredOutputManager._compile

    def held(self: StructuredOutputManager, output: Regex, *args: Any) -> Any:
        if output.pattern == hard:
            begun.append(output)
            assert is_released.wait(60.0)
        return compile(self, output, *args)

    monkeypatch.setattr(StructuredOutputManager, "_compile", held)
    keys = ("a" * 20, "b" * 20)
    client = make_client(api_keys=keys)

    def ask(key: str, pattern: str) -> int:
        body = {"model": "tiny", "prompt": "x", "structured_outputs": {"regex": pattern}}
        headers = {"Authorization": f"Bearer {key}"}
        return client.post("/v1/completions", json=body, headers=headers).status_code

    with ThreadPoolExecutor(9) as pool:
        first = [pool.submit(ask, keys[0], hard) for _ in range(8)]
        try:
            while not begun:
                time.sleep(0.01)
            assert pool.submit(ask, keys[1], "b").result(30.0) == 200
            assert not any(each.done() for each in first)
        finally:
            is_released.set()
        assert [each.result() for each in first] == [200] * 8


@pytest.fixture
def served() -> Iterator[tuple[TestClient, ServerState]]:
    """A server with an engine, and a budget for one small grammar."""
    config = gqa_config(max_position_embeddings=512)
    model = Model(tiny_model(config, torch.float32), byte_tokenizer(), name="tiny")
    state = make_state(AsyncEngine(model), ServeConfig(max_grammar_bytes=MIN_GRAMMAR_BYTES))
    with TestClient(build_app(state), base_url="http://127.0.0.1:8000") as client:
        yield client, state


def post(client: TestClient, form: Choice, **options: object) -> Any:
    body = {"model": "tiny", "prompt": "x", "structured_outputs": {"choice": form.options}}
    return client.post("/v1/completions", json=body | options)


def test_an_exceeded_budget_is_an_overload(served: tuple[TestClient, ServerState]) -> None:
    answer = post(served[0], LARGE)
    assert answer.status_code == 429 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    ("options", "status"),
    [({}, 200), ({"n": 3}, 200), ({"stream": True}, 200), ({"deadline_seconds": 1e-9}, 408)],
)
def test_a_grammar_is_freed_with_its_request(
    served: tuple[TestClient, ServerState], options: dict[str, object], status: int
) -> None:
    """Regression: records that refer to each other, and keep the form until a collector comes."""
    client, state = served
    (model,) = state.models.models
    assert model.loaded is not None
    grammars = model.loaded.structured_outputs
    gc.disable()
    try:
        for _ in range(3):
            assert post(client, Choice(options=("yes", "no")), **options).status_code == status
            until = time.monotonic() + 30.0
            while grammars.used_bytes and time.monotonic() < until:
                time.sleep(0.01)
            assert grammars.used_bytes == 0
    finally:
        gc.enable()
