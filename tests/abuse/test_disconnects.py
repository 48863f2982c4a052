"""Clients that disconnect at random moments, over real connections: nothing leaks."""

import asyncio
import json
import random
import socket
import struct
import threading
from typing import Any

import pytest

from .local import (
    NAME,
    Local,
    counting_model,
    listening,
    num_descriptors,
    num_threads,
    successors,
    until,
)
from .wire import HOST, SECONDS, call, post

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 400, "ignore_eos": True}


class Leaver:
    """Sends a request, or part of it, and leaves at some moment in some way."""

    def __init__(self, rng: random.Random, port: int) -> None:
        self.rng = rng
        self.port = port

    def _data(self) -> bytes:
        stream, long = self.rng.random() < 0.5, self.rng.random() < 0.3
        more: dict[str, Any] = {"stream": stream, "max_tokens": self.rng.choice([1, 20, 300])}
        if self.rng.random() < 0.2:
            more |= {"structured_outputs": {"regex": "[a-z ]{1,200}"}}
        if self.rng.random() < 0.2:
            more |= {"n": 3, "temperature": 1.0}
        if self.rng.random() < 0.5:
            messages = [{"role": "user", "content": "x" * (90 if long else 3)}]
            return post(CHAT, json.dumps({"model": NAME, "messages": messages, **more}).encode())
        prompts = ["abc" * (30 if long else 1)] * self.rng.choice([1, 1, 3])
        body = {"model": NAME, "prompt": prompts, **more}
        return post(COMPLETIONS, json.dumps(body).encode())

    async def go(self) -> None:
        rng, data = self.rng, self._data()
        reader, writer = await asyncio.open_connection(HOST, self.port)
        try:
            if rng.random() < 0.15:
                data = data[: rng.randrange(1, len(data))]
            writer.write(data)
            match rng.randrange(4):
                case 0:
                    await asyncio.sleep(rng.random() * 0.03)
                case 1:
                    for _ in range(rng.randrange(6)):
                        await asyncio.wait_for(reader.read(64), 0.2)
                case 2:
                    await asyncio.wait_for(reader.read(rng.choice([1, 2000])), 0.2)
                case _:
                    pass
        except (TimeoutError, ConnectionError):
            pass
        finally:
            if rng.random() < 0.5:
                # A reset rather than an orderly end.
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
            writer.transport.abort()
            await asyncio.sleep(0)


async def leave(server: Local, rng: random.Random, count: int) -> None:
    """`count` clients, 20 at a time."""

    async def clients() -> None:
        for _ in range(count // 20):
            await Leaver(rng, server.port).go()

    await asyncio.gather(*(clients() for _ in range(20)))


@pytest.mark.slow
def test_a_thousand_disconnects_leave_nothing_behind() -> None:
    """Regression: pages, tasks, threads or sockets leaked by disconnected clients."""
    rng = random.Random(4)
    with listening(max_queue=64, header_seconds=2.0, body_seconds=2.0) as server:
        asyncio.run(leave(server, rng, 100))
        until(lambda: server.is_idle, "the end")
        quiet = server.num_tasks()
        before = (num_descriptors(), num_threads())
        asyncio.run(leave(server, rng, 1000))
        until(lambda: server.is_idle, "the end")
        until(lambda: server.num_tasks() <= quiet, "the end of all tasks")
        until(lambda: num_descriptors() <= before[0], "the end of all sockets")
        until(lambda: num_threads() <= before[1], "the end of all threads")
        assert server.engine._open == {} and server.engine._generations == {}
        server.model.engine.check_integrity()
        body = {"model": NAME, "prompt": "abc", "max_tokens": 12, "temperature": 0}
        answer = call(server.port, COMPLETIONS, body)
        assert json.loads(answer.body)["choices"][0]["text"] == successors("abc", 12)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_is_aborted(monkeypatch: pytest.MonkeyPatch, path: str, stream: bool) -> None:
    """Regression: outputs generated to the end after a disconnect."""
    model = counting_model()
    step, is_held, may_go = model.engine.step, threading.Event(), threading.Event()

    def held() -> Any:
        is_held.set()
        assert may_go.wait(SECONDS)
        return step()

    messages = [{"role": "user", "content": "a"}]
    more = {"prompt": "a"} if path == COMPLETIONS else {"messages": messages}
    data = post(path, json.dumps({"model": NAME, **more, **LONG, "stream": stream}).encode())
    with listening(model) as server:
        monkeypatch.setattr(model.engine, "step", held)
        for number in range(10):
            with socket.create_connection((HOST, server.port), timeout=SECONDS) as connection:
                connection.sendall(data)
                until(lambda: len(server.engine._open) > number, "the request")  # noqa: B023
                until(is_held.is_set, "the first step")
        until(lambda: server.state.num_requests == 0, "the end of all requests")
        may_go.set()
        until(lambda: server.is_idle, "the end")
        assert server.engine.stats.finished["abort"] == 10
