"""Clients of benchmarks/serving/disconnecting.py disconnect on time and record what they got."""

import asyncio
import importlib
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def benchmarks_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks lie outside the package and import one another by `serving.`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))


def leaving() -> ModuleType:
    return importlib.import_module("serving.disconnecting")


def mix() -> ModuleType:
    return importlib.import_module("serving.soak_requests")


@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (b"", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", True),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", False),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n", True),
    ],
)
def test_the_end_of_an_answer(received: bytes, expected: bool) -> None:
    assert leaving().is_whole(received) == expected


class Server:
    """Answers every request in two pieces and notes what came of each connection."""

    def __init__(self) -> None:
        self.whole = 0
        self.ended = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(head.split("Content-Length: ")[1].split("\r\n")[0])
            await reader.readexactly(length)
            self.whole += 1
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
            await asyncio.sleep(0.001)
            writer.write(b"cd")
            await reader.read()
        except (EOFError, ConnectionError):
            pass  # it has left
        finally:
            writer.close()
            self.ended += 1


def test_every_moment_is_drawn_and_broken_requests_are_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, server = leaving(), Server()
    monkeypatch.setattr(module, "WHILE", (0.001, 0.002))

    async def run() -> Any:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        drawn = mix().Mix("m", seed=1, has_chat=True, longest=9)
        leaver = module.Leaver(port, drawn, seed=2)
        await module.leave_all(leaver, 200, at_once=10)
        async with asyncio.timeout(20):
            while server.ended < 200:
                await asyncio.sleep(0.01)
        listener.close()
        return leaver.departures

    departures = asyncio.run(run())
    assert set(departures.moments) == set(module.MOMENTS)
    assert departures.moments.total() == 200
    assert 60 < departures.resets < 140
    # Resets may reach the server before it has read what was sent.
    assert 0 < server.whole <= 200 - departures.moments["in its request"]
    assert departures.received["all"] >= departures.moments["after the answer"]
    assert not departures.unserved


def test_a_storm_leaves_within_its_second() -> None:
    module, left = leaving(), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1 << 16):
                pass
        except ConnectionError:
            pass  # a reset
        finally:
            writer.close()
        left.append(writer)

    async def run() -> float:
        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        storm = module.Storm(port=listener.sockets[0].getsockname()[1])
        call = mix().Call(manner="cancelled", path="/", body={"prompt": "a"}, kind="storm")
        await storm.send([call] * 20)
        assert not left
        seconds = await storm.leave(random.Random(3), 0.1)
        async with asyncio.timeout(20):
            while len(left) < 20:
                await asyncio.sleep(0.01)
        listener.close()
        return seconds

    assert asyncio.run(run()) >= 0.09
