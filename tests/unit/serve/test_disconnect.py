"""Clients that disconnect, do not read, or wait long, simulated with ASGI messages."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message, Scope

from lowlat.serve.app import build_app, make_state
from lowlat.serve.config import ServeConfig

from .fake_engine import NAME, Answer, FakeEngine

PATIENCE = 60.0
"""Seconds that anything may take on a machine with much else to do."""
CHAT = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": NAME, "prompt": "Hi"},
    "/v1/responses": {"model": NAME, "input": "Hi"},
}


class Client:
    """One connection: sends a body, and disconnects on request."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.sent: list[Message] = []
        self.has_left = asyncio.Event()
        self._body = json.dumps(body).encode()
        self._is_read = False

    async def receive(self) -> Message:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self.has_left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()


def scope(path: str) -> Scope:
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    return {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "http_version": "1.1",
        "headers": headers,
        "state": {},
    }


async def until(condition: Callable[[], Any]) -> None:
    """Return when `condition()` is true; fail if it does not become true."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        await asyncio.sleep(0.002)


def run(
    engine: FakeEngine,
    path: str,
    body: dict[str, Any],
    act: Callable[[Client, asyncio.Task[None]], Awaitable[None]],
    **options: Any,
) -> Client:
    """Send `body`, let `act` play the client, and await the end of the request."""

    async def main() -> Client:
        state = make_state(engine, ServeConfig(**options))
        app = build_app(state)
        client = Client(body)
        task = asyncio.create_task(app(scope(path), client.receive, client.send))
        await act(client, task)
        await asyncio.wait_for(task, PATIENCE)
        state.close()
        assert state.num_requests == 0
        return client

    return asyncio.run(main())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("text", ["", "Some text"])
def test_leaving_ends_the_generation(
    engine: FakeEngine, path: str, stream: bool, text: str
) -> None:
    """Before the first token and after some of them, streamed and not."""
    engine.answer = Answer(text=text, hangs=True)

    async def leave(client: Client, task: asyncio.Task[None]) -> None:
        await until(lambda: engine.generations)
        if stream and text:
            await until(lambda: "t" in client.text and len(client.sent) > 8)
        assert not engine.generations[0].is_cancelled
        client.has_left.set()

    client = run(engine, path, {**BODIES[path], "stream": stream}, leave)
    assert engine.generations[0].is_cancelled
    if not stream:
        assert client.sent == []


def test_leaving_while_the_prompt_is_made(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: a generation that starts after the disconnect and is never cancelled."""
    import threading

    from lowlat.serve.routes import chat as routes_chat

    started, may_end = threading.Event(), threading.Event()
    prepare = routes_chat.prepare_chat

    def slow(*args: Any) -> Any:
        started.set()
        may_end.wait(PATIENCE)
        return prepare(*args)

    monkeypatch.setattr(routes_chat, "prepare_chat", slow)

    async def leave(client: Client, task: asyncio.Task[None]) -> None:
        await until(started.is_set)
        client.has_left.set()
        await asyncio.wait_for(asyncio.shield(task), PATIENCE)
        may_end.set()

    run(engine, "/v1/chat/completions", CHAT, leave)
    assert engine.asked == []


def test_disconnect_before_the_body_is_complete(engine: FakeEngine) -> None:
    async def leave(client: Client, task: asyncio.Task[None]) -> None:
        client.has_left.set()

    client = run(engine, "/v1/chat/completions", CHAT, leave)
    assert engine.asked == [] or engine.generations[0].is_cancelled
    assert client.sent == []


def test_a_silent_stream_sends_pings(engine: FakeEngine) -> None:
    engine.answer = Answer(text="x", hangs=True)

    async def wait(client: Client, task: asyncio.Task[None]) -> None:
        await until(lambda: client.text.count(": ping\n\n") > 2)
        client.has_left.set()

    run(engine, "/v1/chat/completions", {**CHAT, "stream": True}, wait, ping_seconds=0.01)


def test_a_client_that_reads_nothing_is_given_up(engine: FakeEngine) -> None:
    """Regression: generations that run on for half-open connections."""
    engine.answer = Answer(text="x" * 50)

    async def main() -> None:
        app = build_app(make_state(engine, ServeConfig(send_seconds=0.05)))
        client = Client({**CHAT, "stream": True})

        async def send(message: Message) -> None:
            await asyncio.Event().wait()

        await asyncio.wait_for(app(scope("/v1/chat/completions"), client.receive, send), PATIENCE)

    asyncio.run(main())
    assert engine.generations[0].is_cancelled
    assert not engine.generations[0].is_finished


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_waits_no_longer_says_so(engine: FakeEngine, stream: bool) -> None:
    """Regression: status 500 and a traceback for requests that run at shutdown."""
    engine.answer = Answer(text="x", hangs=True)

    async def end(client: Client, task: asyncio.Task[None]) -> None:
        await until(lambda: engine.generations and (client.sent or not stream))
        task.cancel()

    client = run(engine, "/v1/completions", {**BODIES["/v1/completions"], "stream": stream}, end)
    assert engine.generations[0].is_cancelled
    if stream:
        assert client.sent[-1]["more_body"]
    else:
        assert client.sent[0]["status"] == 503
        assert json.loads(client.text)["error"]["code"] == "shutting_down"


def test_a_storm_of_leaving_clients_loses_no_generation(engine: FakeEngine) -> None:
    """Clients that leave at every moment of a request's life."""
    engine.answer = Answer(text="abcdef" * 5, seconds=0.0005)

    async def main() -> None:
        state = make_state(engine, ServeConfig())
        app = build_app(state)

        async def one(number: int) -> None:
            path = list(BODIES)[number % 3]
            client = Client({**BODIES[path], "stream": bool(number % 2)})
            task = asyncio.create_task(app(scope(path), client.receive, client.send))
            for _ in range(number):
                await asyncio.sleep(0.001)
            client.has_left.set()
            await asyncio.wait_for(task, PATIENCE)

        await asyncio.gather(*(one(number) for number in range(90)))
        state.close()
        assert state.num_requests == 0

    asyncio.run(main())
    assert engine.generations
    assert all(generation.is_cancelled for generation in engine.generations)
