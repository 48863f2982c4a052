"""Deadlines count from a request's arrival, in every phase."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from lowlat.serve.routes import chat as routes_chat
from lowlat.serve.routes import completions as routes_completions
from lowlat.serve.routes import endpoint
from lowlat.serve.structured_outputs import StructuredOutputManager

from .conftest import MakeClient
from .fake_engine import NAME, FakeEngine

SECONDS = 0.2
"""What the slow part takes, and more than a short deadline."""
CHAT = "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}
COMPLETIONS = "/v1/completions", {"prompt": "x"}
FORM = "/v1/completions", {"prompt": "x", "structured_outputs": {"choice": ["yes"]}}
Patch = Callable[[pytest.MonkeyPatch, threading.Event], None]


def slow(owner: Any, name: str) -> Patch:
    def apply(patch: pytest.MonkeyPatch, may_begin: threading.Event) -> None:
        function = getattr(owner, name)

        def held(*args: Any) -> Any:
            assert may_begin.wait(60.0)
            time.sleep(SECONDS)
            return function(*args)

        patch.setattr(owner, name, held)

    return apply


def slow_body(patch: pytest.MonkeyPatch, _: threading.Event) -> None:
    read = endpoint.read_body

    async def held(*args: Any, **options: Any) -> bytes:
        await asyncio.sleep(SECONDS)
        return await read(*args, **options)

    patch.setattr(endpoint, "read_body", held)


SLOW: dict[str, tuple[Patch, tuple[str, dict[str, Any]]]] = {
    "body": (slow_body, COMPLETIONS),
    "template": (slow(routes_chat, "prepare_chat"), CHAT),
    "tokenising": (slow(routes_completions, "_encode"), COMPLETIONS),
    "form": (slow(StructuredOutputManager, "_compile"), FORM),
}


@pytest.mark.parametrize("part", SLOW)
def test_what_comes_before_the_engine_counts(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Regression: a deadline that starts when the request has waited for all else."""
    patch, (path, body) = SLOW[part]
    may_begin = threading.Event()
    patch(monkeypatch, may_begin)
    body = {"model": NAME, **body}
    late = client.post(path, json={**body, "deadline_seconds": 0.1})
    may_begin.set()
    assert late.status_code == 408 and engine.asked == []
    error = late.json()["error"]
    assert (error["param"], error["code"]) == ("deadline_seconds", "deadline_exceeded")
    assert client.post(path, json={**body, "deadline_seconds": 600}).status_code == 200
    assert engine.asked[0].deadline is not None
    assert 300.0 < engine.asked[0].deadline <= 600.0 - SECONDS


def test_the_servers_own_limit_counts_in_the_same_way(
    make_client: MakeClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_begin = threading.Event()
    slow(routes_chat, "prepare_chat")(monkeypatch, may_begin)
    path, body = CHAT
    client = make_client(request_seconds=0.1)
    assert client.post(path, json={"model": NAME, **body}).status_code == 408
    assert engine.asked == []
    may_begin.set()


def test_what_is_with_the_engine_is_the_engines_to_end(
    client: TestClient, engine: FakeEngine
) -> None:
    """Regression: an answer cut off by the limit of what comes before it."""
    engine.answer.seconds = 0.3
    path, body = COMPLETIONS
    for stream in (False, True):
        body = {**body, "model": NAME, "deadline_seconds": 1.0, "stream": stream}
        answer = client.post(path, json=body)
        assert answer.status_code == 200 and "deadline_exceeded" not in answer.text
