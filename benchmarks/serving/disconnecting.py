"""Clients that disconnect at a random moment, by an orderly close or a reset.

Records which part of the response each client had received.
"""

import asyncio
import json
import math
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, get_args

from serving.servers import HOST
from serving.soak_requests import Call, Mix

Moment = Literal["in its request", "at once", "after a while", "in the answer", "after the answer"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
WHILE = (0.001, 2.0)
"""Range of "after a while" in seconds: the request is queued, in prefill or in decode."""
MOST_PIECES = 20
END_OF_CHUNKS = b"0\r\n\r\n"
RESET = struct.pack("ii", 1, 0)
"""SO_LINGER value with which closing sends a TCP reset."""
EOS_IGNORED = {"greedy", "sampled", "several", "penalised", "logprobs"}
"""Kinds of requests that accept ignore_eos."""


@dataclass(kw_only=True, slots=True)
class Departures:
    """Number of disconnected clients by moment and by received part of the response."""

    moments: Counter[str] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)
    resets: int = 0
    unserved: Counter[str] = field(default_factory=Counter)
    """Responses with a status other than 200, by status."""


class Leaver:
    """Sends random requests and disconnects."""

    def __init__(self, port: int, mix: Mix, *, seed: int) -> None:
        self.departures = Departures()
        self._port = port
        self._mix = mix
        self._rng = random.Random(seed)

    async def leave(self) -> None:
        """Run one client, from connect to disconnect."""
        rng, departures = self._rng, self.departures
        moment = rng.choice(MOMENTS)
        data = encoded(self._draw(moment))
        if moment == "in its request":
            data = data[: rng.randrange(1, len(data))]
        pieces = {"in the answer": rng.randint(1, MOST_PIECES), "after the answer": None}
        reader, writer = await asyncio.open_connection(HOST, self._port)
        received = b""
        try:
            writer.write(data)
            await writer.drain()
            if moment in pieces:
                received = await read(reader, pieces[moment])
            elif moment != "at once":
                await asyncio.sleep(math.exp(rng.uniform(*map(math.log, WHILE))))
        except ConnectionError:
            pass  # the server may reject a request before it has received all of it
        finally:
            is_reset = rng.random() < 0.5
            disconnect(writer, is_reset=is_reset)
        departures.moments[moment] += 1
        departures.resets += is_reset
        self._note(received)

    def _draw(self, moment: Moment) -> Call:
        call = self._mix.draw()
        while call.manner == "invalid":
            call = self._mix.draw()
        assert isinstance(call.body, dict)
        if call.kind in EOS_IGNORED and moment != "after the answer":
            call.body["ignore_eos"] = True
        return call

    def _note(self, received: bytes) -> None:
        head, _, body = received.partition(b"\r\n\r\n")
        if not received:
            self.departures.received["nothing"] += 1
            return
        status = head.split(b" ", 2)[1].decode()
        if status != "200":
            self.departures.unserved[status] += 1
        kind = "all" if is_whole(received) else "a part" if body else "headers"
        self.departures.received[kind] += 1


async def read(reader: asyncio.StreamReader, pieces: int | None) -> bytes:
    """The first `pieces` reads of a response; all of it for None."""
    received = b""
    while pieces != 0 and not is_whole(received):
        piece = await reader.read(65536)
        if not piece:
            return received
        received += piece
        pieces = None if pieces is None else pieces - 1
    return received


def is_whole(received: bytes) -> bool:
    """Whether the response is complete."""
    head, end, body = received.partition(b"\r\n\r\n")
    if not end:
        return False
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line.split(b":")[1])
    return body.endswith(END_OF_CHUNKS)


def encoded(call: Call) -> bytes:
    """The bytes of a request."""
    body = call.body if isinstance(call.body, bytes) else json.dumps(call.body).encode()
    head = (
        f"POST {call.path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def disconnect(writer: asyncio.StreamWriter, *, is_reset: bool) -> None:
    """Close the connection at once, in any state."""
    if is_reset:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


async def leave_all(leaver: Leaver, count: int, *, at_once: int) -> None:
    """Run `count` clients, `at_once` at a time."""
    remaining = iter(range(count))

    async def clients() -> None:
        for _ in remaining:
            await leaver.leave()

    await asyncio.gather(*(clients() for _ in range(at_once)))


@dataclass(kw_only=True, slots=True)
class Storm:
    """Clients that all wait for a response and then disconnect within a second."""

    port: int
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def send(self, calls: Iterable[Call]) -> None:
        for call in calls:
            _, writer = await asyncio.open_connection(HOST, self.port)
            writer.write(encoded(call))
            await writer.drain()
            self.writers.append(writer)

    async def leave(self, rng: random.Random, seconds: float) -> float:
        """Disconnect all, spread evenly over `seconds`; returns the seconds it took."""
        rng.shuffle(self.writers)
        loop = asyncio.get_running_loop()
        begin = loop.time()
        for number, writer in enumerate(self.writers):
            due = begin + seconds * number / len(self.writers)
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            disconnect(writer, is_reset=rng.random() < 0.5)
        await asyncio.sleep(0)
        taken = loop.time() - begin
        self.writers.clear()
        return taken
