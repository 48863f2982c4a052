"""More than can be served: refusals are quick and say when to come back, the rest is served right.

How quick is measured by benchmarks/overload.py; nothing here depends on the clock.
"""

import asyncio
import gc
import json
import random
import socket
import struct
import threading
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from .local import NAME, Local, counting_model, listening, num_descriptors, successors, until
from .wire import HOST, SECONDS, Reply, call, get, post

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"


def completion(text: str = "abc", max_tokens: int = 12, **more: Any) -> dict[str, Any]:
    return {"model": NAME, "prompt": text, "max_tokens": max_tokens, "temperature": 0, **more}


async def ask(port: int, data: bytes) -> Reply:
    """Send `data` on a connection of its own and read one response of known length."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(data)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.strip().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["content-length"]))
        return Reply(status=int(first.split()[1]), headers=headers, body=body)
    finally:
        writer.close()
        await writer.wait_closed()


def wave(port: int, bodies: list[dict[str, Any]]) -> list[Reply]:
    """Send all bodies at once."""

    async def send() -> list[Reply]:
        data = [post(COMPLETIONS, json.dumps(body).encode()) for body in bodies]
        return await asyncio.wait_for(asyncio.gather(*(ask(port, one) for one in data)), SECONDS)

    return asyncio.run(send())


def check_wave(bodies: list[dict[str, Any]], replies: list[Reply]) -> Counter[int]:
    """Each is answered right or refused right; returns how often which."""
    for body, reply in zip(bodies, replies, strict=True):
        if reply.status == 429:
            assert 1 <= int(reply.headers["retry-after"]) <= 60
            error = reply.error
            assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
        else:
            assert reply.status == 200, reply
            (choice,) = json.loads(reply.body)["choices"]
            assert choice["text"] == successors(body["prompt"], body["max_tokens"])
            assert choice["finish_reason"] == "length"
    return Counter(reply.status for reply in replies)


def bodies_for(rng: random.Random, count: int) -> list[dict[str, Any]]:
    texts = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 60))) for _ in range(count)]
    return [completion(text, rng.randint(1, 12)) for text in texts]


def test_ten_times_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the engine stands still, everything above the queue is refused; then all is served."""
    model = counting_model()
    step, may_go = model.engine.step, threading.Event()

    def held() -> Any:
        assert may_go.wait(SECONDS)
        return step()

    monkeypatch.setattr(model.engine, "step", held)
    with listening(model, max_queue=10) as server:
        bodies = bodies_for(random.Random(1), 110)
        timer = threading.Timer(1.0, may_go.set)
        timer.start()
        counts = check_wave(bodies, wave(server.port, bodies))
        timer.join()
        # What waits for its first step is in the queue; the step that is held has taken some.
        assert 10 <= counts[200] <= 20 and counts[429] >= 90, counts
        until(lambda: server.is_idle, "the end")
        assert check_wave(bodies[:9], wave(server.port, bodies[:9])) == {200: 9}


def test_waves_of_overload_leave_nothing_behind() -> None:
    """Memory, pages, tasks and descriptors after many waves are those after some."""
    rng = random.Random(2)
    with listening(max_queue=8, max_requests=64) as server:

        def waves(count: int) -> Counter[int]:
            total: Counter[int] = Counter()
            for _ in range(count):
                bodies = bodies_for(rng, 80)
                total += check_wave(bodies, wave(server.port, bodies))
            until(lambda: server.is_idle, "the end")
            gc.collect()
            return total

        waves(5)
        tracemalloc.start()
        try:
            waves(2)
            before = (server.num_tasks(), num_descriptors(), threading.active_count())
            memory = tracemalloc.get_traced_memory()[0]
            counts = waves(12)
            after = (server.num_tasks(), num_descriptors(), threading.active_count())
            grown = tracemalloc.get_traced_memory()[0] - memory
        finally:
            tracemalloc.stop()
        assert counts[200] > 50 and counts[429] > 50, counts
        assert after == before
        # 960 requests: a leak of 300 bytes each would show.
        assert grown < 300_000, f"{grown} bytes more"
        server.model.engine.check_integrity()


def test_work_above_the_cap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds shut: bodies parsed and tokenized without bound, before the engine's queue is asked."""
    from lowlat.serve import endpoint

    parse, may_go = endpoint._parse, threading.Event()

    def held(*args: Any) -> Any:
        assert may_go.wait(SECONDS)
        return parse(*args)

    monkeypatch.setattr(endpoint, "_parse", held)
    with listening(max_queue=1000, workers=1, max_waiting_work=4) as server:
        timer = threading.Timer(1.0, may_go.set)
        timer.start()
        bodies = bodies_for(random.Random(3), 50)
        counts = check_wave(bodies, wave(server.port, bodies))
        timer.join()
        assert counts == {200: 5, 429: 45}
        until(lambda: server.is_idle, "the end")


def test_health_is_told_under_overload() -> None:
    """Refusals and answers about health need no room in any queue."""
    model = counting_model()
    step, may_go = model.engine.step, threading.Event()

    def held() -> Any:
        assert may_go.wait(SECONDS)
        return step()

    with listening(model, max_queue=2, max_requests=8) as server:
        model.engine.step = held
        thread = threading.Thread(
            target=lambda: wave(server.port, [completion() for _ in range(40)])
        )
        thread.start()
        until(lambda: server.services.num_requests > 0, "a request")
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert get(server.port, path).status == 200
        may_go.set()
        thread.join(SECONDS)
        until(lambda: server.is_idle, "the end")


def test_a_client_that_reads_nothing_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Holds shut: streams kept, with their pages, for who has stopped to read them."""
    with listening(send_seconds=0.3, send_buffer=4096) as server:
        body = completion("a", 480, logprobs=20, stream=True, ignore_eos=True)
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(SECONDS)
            connection.connect((HOST, server.port))
            connection.sendall(post(COMPLETIONS, json.dumps(body).encode()))
            until(lambda: server.services.num_requests == 1, "the request")
            until(lambda: server.is_idle, "the end")
            assert "the client reads nothing" in caplog.text


# Clients that leave


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


def test_a_thousand_disconnects_leave_nothing_behind() -> None:
    """Holds shut: pages, tasks, threads or sockets kept for clients that have left."""
    rng = random.Random(4)
    with listening(max_queue=64, header_seconds=2.0, body_seconds=2.0) as server:
        asyncio.run(leave(server, rng, 100))
        until(lambda: server.is_idle, "the end")
        quiet = server.num_tasks()
        before = (num_descriptors(), threading.active_count())
        asyncio.run(leave(server, rng, 1000))
        until(lambda: server.is_idle, "the end")
        until(lambda: server.num_tasks() <= quiet, "the end of all tasks")
        until(lambda: num_descriptors() <= before[0], "the end of all sockets")
        assert threading.active_count() <= before[1]
        assert server.services.bridge._open == {} and server.services.bridge._live == {}
        server.model.engine.check_integrity()
        answer = call(server.port, COMPLETIONS, completion())
        assert json.loads(answer.body)["choices"][0]["text"] == successors("abc", 12)
