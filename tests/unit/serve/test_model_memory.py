"""Memory of several models in one server: which are unloaded, when, and that it is freed."""

import asyncio
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest

from lowlat.generate.model import Model
from lowlat.serve.chat import template_features
from lowlat.serve.model_registry import num_bytes_of
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

from .on_demand import (
    BYTES,
    Background,
    complete,
    error_of,
    gauge,
    holding,
    one,
    serving,
    states,
    stepping_model,
    text_of,
    three,
    two,
    until,
)


def test_the_least_recently_used_model_makes_room() -> None:
    with serving(one(), two(), three(), memory_bytes=2 * BYTES) as (client, _):
        for name, text in (("one", "bcd"), ("two", "ceg"), ("one", "bcd"), ("three", "dgj")):
            assert text_of(complete(client, name)) == text
        assert states(client) == {"one": "ready", "two": "unloaded", "three": "ready"}
        assert gauge(client, "model_unloads_total", "two") == 1
        # Counters stay, gauges end.
        assert gauge(client, "generation_tokens_total", "two") == 3
        assert gauge(client, "kv_cache_pages", "two") == 0
        assert gauge(client, "model_memory_bytes", "two") == 0
        assert text_of(complete(client, "two")) == "ceg"
        assert states(client) == {"one": "unloaded", "two": "ready", "three": "ready"}


def test_a_model_with_requests_stays() -> None:
    a = one()
    with serving(a, two(), memory_bytes=BYTES, load_seconds=0.05) as (client, _):
        until(lambda: complete(client, "one").status_code == 200)
        began, may_end = holding(a)
        running = Background(lambda: complete(client, "one"))
        until(began.is_set)
        response = complete(client, "two")
        message = error_of(response, 503, "insufficient_memory")
        assert "'one'" in message and "1 requests" in message
        assert int(response.headers["retry-after"]) > 0
        assert states(client)["one"] == "ready"
        may_end.set()
        assert text_of(running.result()) == "bcd"
        until(lambda: complete(client, "two").status_code == 200)
        assert states(client) == {"one": "unloaded", "two": "ready"}


def test_a_request_waits_until_others_free_the_memory() -> None:
    a = one()
    with serving(a, two(), memory_bytes=BYTES) as (client, _):
        text_of(complete(client, "one"))
        began, may_end = holding(a)
        running = Background(lambda: complete(client, "one"))
        until(began.is_set)
        waiting = Background(lambda: complete(client, "two"))
        until(lambda: gauge(client, "num_requests_loading", "two") == 1)
        assert waiting.is_running
        may_end.set()
        assert text_of(running.result()) == "bcd" and text_of(waiting.result()) == "ceg"


def test_a_request_that_comes_later_waits_for_memory_as_long() -> None:
    a = one()
    with serving(a, two(), memory_bytes=BYTES) as (client, state):
        text_of(complete(client, "one"))
        began, may_end = holding(a)
        running = Background(lambda: complete(client, "one"))
        until(began.is_set)
        # A request's own time passes, not that of the load it shares.
        object.__setattr__(state.config, "load_seconds", 0.5)
        first = Background(lambda: complete(client, "two"))
        until(lambda: state.models._waiting or not first.is_running)
        object.__setattr__(state.config, "load_seconds", 120.0)
        second = Background(lambda: complete(client, "two"))
        error_of(first.result(), 503, "insufficient_memory")
        assert second.is_running
        may_end.set()
        assert text_of(running.result()) == "bcd" and text_of(second.result()) == "ceg"


def test_a_model_larger_than_the_limit_is_refused() -> None:
    with serving(one(), two(), memory_bytes=BYTES - 1) as (client, _):
        message = error_of(complete(client, "one"), 503, "insufficient_memory")
        assert "--memory" in message
        assert states(client) == {"one": "unloaded", "two": "unloaded"}


def test_an_idle_model_is_unloaded() -> None:
    a = one()
    with serving(a, unload_seconds=0.05) as (client, _):
        for number in range(2):
            assert text_of(complete(client, "one")) == "bcd"
            until(lambda: states(client)["one"] == "unloaded")
            assert a.num_attempts == number + 1
        (entry,) = client.get("/api/tags").json()["models"]
        assert entry["name"] == "one"


def test_an_idle_model_has_one_timer() -> None:
    with serving(one(), unload_seconds=600.0) as (client, state):
        for _ in range(3):
            text_of(complete(client, "one"))

        async def timers() -> int:
            scheduled = asyncio.get_running_loop()._scheduled  # pyright: ignore
            unload = state.models._unload_if_idle
            return sum(timer._callback == unload for timer in scheduled)

        assert client.portal is not None
        assert client.portal.call(timers) == 1


def test_unloading_leaves_the_template_features_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def find(source: str) -> None:
        found.append(source)

    monkeypatch.setattr(template_features, "find_tool_parser", find)
    with serving(one(), two(), three(), memory_bytes=2 * BYTES) as (client, _):
        for name in ("one", "two", "three"):
            text_of(complete(client, name))
        until(lambda: states(client)["one"] == "unloaded")
        num_found = len(found)
        body = {
            "model": "two",
            "messages": [{"role": "user", "content": "a"}],
            "stream": False,
            "options": {"num_predict": 2},
        }
        assert client.post("/api/chat", json=body).status_code == 200
        assert len(found) == num_found


def test_a_failed_load_is_freed_without_the_garbage_collector() -> None:
    a = one()
    parts: list[weakref.ref[Any]] = []

    def load(progress: Progress) -> Model:
        model = stepping_model(1)
        parts.append(weakref.ref(model.transformer))
        try:
            raise OSError("no space left")
        except OSError as error:
            raise UserError("the model does not fit") from error

    assert a.served.prepared is not None
    a.served.prepared = replace(a.served.prepared, load=load)
    gc.collect()
    gc.disable()
    try:
        with serving(a, two()) as (client, _):
            error_of(complete(client, "one"), 503, "model_failed")
            (part,) = parts
            until(lambda: part() is None)
    finally:
        gc.enable()


def test_memory_is_freed_without_the_garbage_collector() -> None:
    """The collector skips frozen objects, and a full collection stalls all requests."""
    a = one()
    gc.collect()
    gc.disable()
    try:
        with serving(a, two(), memory_bytes=BYTES) as (client, _):
            text_of(complete(client, "one"))
            model = a.models.pop()
            parts = [
                weakref.ref(part)
                for part in (model, model.engine, model.runner, model.transformer, model.tokenizer)
            ]
            transformer, layers = model.transformer, model.runner.cache.layers
            assert layers and any(parameter.numel() for parameter in transformer.parameters())
            text_of(complete(client, "two"))
            assert layers == [] and list(transformer.parameters()) == []
            del model, transformer, layers
            until(lambda: [part for part in parts if part() is not None] == [])
    finally:
        gc.enable()


def test_the_memory_of_a_model_is_weights_and_cache() -> None:
    model = stepping_model(1)
    weights = sum(parameter.nbytes for parameter in model.transformer.parameters())
    cache = sum(layer.nbytes for layer in model.runner.cache.layers)
    assert num_bytes_of(model) == weights + cache
