"""Clients that hold connections open, with or without a key.

Routes are asked of the application, so that a new one is covered when it is added.
"""

import contextlib
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from lowlat.serve.http import connection as connection_module
from lowlat.serve.http import incoming
from lowlat.serve.routes import endpoint
from tests.parameters import slow_except

from .local import NAME, Local, listening, num_descriptors, until
from .wire import HOST, JSON_HEADERS, SECONDS, exchange, get, post, request

KEY = "k" * 32
BOUND = f"Bearer {KEY}"
FORM = "application/x-www-form-urlencoded"
TYPES = ("application/json", FORM)
UNENDED = {"Content-Length": "1000000"}
PROMPT: dict[str, Any] = {"header_seconds": 0.3, "body_seconds": 0.3, "send_seconds": 0.5}
PROMPT |= {"keep_alive_seconds": 1}


@pytest.fixture(autouse=True)
def short_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "LINGER_SECONDS", 0.2)


def heads(server: Local) -> Iterator[bytes]:
    """The beginning of a request with a body, for each route there is and some that are none; with
    a key, without one, and addressed to another host.
    """
    none = [("POST", "/nothing"), ("PUT", "/v1/models"), ("BREW", "/"), ("POST", "/health")]
    variants = ({}, {"Authorization": BOUND}, {"Host": "evil.example"})
    for (method, path), kind, more in itertools.product([*server.routes, *none], TYPES, variants):
        headers = {"Host": HOST, "Content-Type": kind, **UNENDED, **more}
        yield request(method, path, headers)


def held_after(connections: Sequence[socket.socket], *, is_trickling: bool) -> set[int]:
    """Which are open after all times are over; a byte now and then is sent on each meanwhile."""
    held = set(range(len(connections)))
    end = time.monotonic() + SECONDS
    for connection in connections:
        connection.setblocking(False)
    while held and time.monotonic() < end:
        for number in list(held):
            try:
                if is_trickling:
                    connections[number].send(b"a")
                while data := connections[number].recv(65536):
                    assert data
                held.discard(number)
            except BlockingIOError:
                pass
            except ConnectionError:
                held.discard(number)
        time.sleep(0.05)
    return held


@pytest.mark.parametrize("is_trickling", [True, False], ids=["a byte now and then", "one byte"])
@pytest.mark.parametrize("keys", slow_except([()], [(), (KEY,)]), ids=["open", "locked"])
def test_no_route_waits_for_a_body_forever(keys: tuple[str, ...], is_trickling: bool) -> None:
    """Regression: connections held open by a body without end, whether it is read or not."""
    with listening(api_keys=keys, **PROMPT) as server, contextlib.ExitStack() as stack:
        sent = list(heads(server))
        connections = [
            stack.enter_context(socket.create_connection((HOST, server.port))) for _ in sent
        ]
        for connection, head in zip(connections, sent, strict=True):
            connection.sendall(head)
        # The answers that do not wait for the body are there when its first byte comes.
        time.sleep(0.1)
        for connection in connections:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"a")
        held = held_after(connections, is_trickling=is_trickling)
        assert not held, [sent[number] for number in held]


@pytest.mark.parametrize("path", ["/v1/completions", "/nothing", "/health"])
def test_an_early_answer_says_that_the_connection_ends(path: str) -> None:
    """And is read to its end by a client that still sends."""
    with listening(api_keys=(KEY,)) as server:
        whole = exchange(server.port, post(path, b"{}"))
        assert "connection" not in whole.headers
        for body in (b"", b" " * 2_000_000):
            head = request("POST", path, {"Host": HOST, "Content-Length": "4000000"})
            early = exchange(server.port, head + body)
            assert (early.status, early.error) == (whole.status, whole.error)
            assert early.headers["connection"] == "close"


def test_a_body_that_comes_late_is_read_where_it_is_wanted() -> None:
    with listening() as server:
        chat = {"model": NAME, "prompt": "abc", "max_tokens": 2, "temperature": 0}
        body = json.dumps(chat).encode()
        data = post("/v1/completions", body)
        with socket.create_connection((HOST, server.port), timeout=SECONDS) as connection:
            for _ in range(2):
                connection.sendall(data[: -len(body)])
                time.sleep(0.1)
                connection.sendall(body)
                response = http.client.HTTPResponse(connection)
                response.begin()
                assert (response.status, response.will_close) == (200, False)
                assert json.loads(response.read())["choices"][0]["text"] == "de"


def test_leaving_the_login_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    with listening(api_keys=(KEY,)) as server:
        quiet = num_descriptors()
        head = request("POST", "/login", {"Host": HOST, "Content-Type": FORM, **UNENDED})
        with socket.create_connection((HOST, server.port), timeout=SECONDS) as connection:
            connection.sendall(head.replace(b"1000000", b"100"))
            time.sleep(0.1)
        until(lambda: num_descriptors() <= quiet, "the end of the connection")
        assert get(server.port, "/health").status == 200
    assert "internal error" not in caplog.text


@pytest.mark.parametrize("count", [10, 2000])
def test_who_reads_no_answer_is_cut_off(count: int, caplog: pytest.LogCaptureFixture) -> None:
    """Regression: responses buffered for clients without a key that do not read; few are less than
    the server waits for before it writes more, many are not.
    """
    times = {"send_seconds": 0.5, "keep_alive_seconds": 1}
    with listening(api_keys=(KEY,), send_buffer=4096, **times) as server:
        quiet = num_descriptors()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.settimeout(0.2)
            connection.connect((HOST, server.port))
            with contextlib.suppress(TimeoutError):
                connection.sendall(request("GET", "/") * count)
            until(lambda: "connection aborted" in caplog.text, "the word about it")
            # This end of it stays open.
            until(lambda: num_descriptors() <= quiet + 1, "the end of the connection")


def half(key: str = "") -> bytes:
    """A request whose body has begun and does not continue."""
    headers = {**JSON_HEADERS, **UNENDED, **({"Authorization": f"Bearer {key}"} if key else {})}
    return request("POST", "/v1/completions", headers) + b"{"


def completed(port: int, key: str = "") -> int:
    """Status of a completion on a connection of its own."""
    body = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": 1}).encode()
    return exchange(port, post("/v1/completions", body, Authorization=f"Bearer {key}")).status


@contextlib.contextmanager
def opened(port: int, count: int, data: bytes) -> Iterator[list[socket.socket]]:
    """`count` connections on each of which `data` is sent."""
    with contextlib.ExitStack() as stack:
        made = [
            stack.enter_context(socket.create_connection((HOST, port), timeout=SECONDS))
            for _ in range(count)
        ]
        for connection in made:
            connection.sendall(data)
        yield made


def answered(connection: socket.socket) -> bytes:
    """The first bytes of the response; b"" if the server closed without one."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(65536)
    return b""


def test_half_sent_bodies_take_no_place_in_the_queue() -> None:
    """Regression: 300 connections with headers and `{` that made every POST a 429."""
    with listening(max_queue=4, max_requests=4) as server, opened(server.port, 40, half()):
        until(lambda: server.num_tasks() >= 40, "the requests")
        assert [completed(server.port) for _ in range(3)] == [200] * 3


def test_slow_bodies_of_one_key_make_way_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each key has a quarter of the places; another's body that comes slowly keeps its own."""
    monkeypatch.setattr(incoming, "GRACE_SECONDS", 0.05)
    keys = (KEY, "o" * 32)
    options: dict[str, Any] = {"api_keys": keys, "max_slow_bodies": 16, "body_seconds": SECONDS}
    body = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": 1}).encode()
    whole = post("/v1/completions", body, Authorization=f"Bearer {keys[1]}")
    with listening(**options) as server:
        # Several addresses: the address has a quarter of the places, too.
        other = socket.create_connection((HOST, server.port), SECONDS, ("127.0.0.2", 0))
        with other, opened(server.port, 12, half(keys[0])) as held:
            other.sendall(whole[:-10])
            until(lambda: len(server.state.bodies._slow) == 5, "the slow ones")
            other.sendall(whole[-10:])
            assert b" 200 " in answered(other)
            for connection in held:
                connection.setblocking(False)
            late: set[int] = set()

            def refused() -> int:
                for number, connection in enumerate(held):
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        if number not in late and b" 408 " in connection.recv(65536):
                            late.add(number)
                return len(late)

            until(lambda: refused() == 8, "the refusals")
            assert completed(server.port, keys[0]) == 200


def test_idle_connections_make_way() -> None:
    """Regression: idle connections that made every further one a 503."""
    with listening(max_connections=5) as server:
        with opened(server.port, 5, request("GET", "/health")) as held:
            assert all(b" 200 " in answered(connection) for connection in held)
            for _ in range(12):
                assert get(server.port, "/health").status == 200
            # The longest idle ones were closed: their streams end.
            while answered(held[0]):
                pass
        with opened(server.port, 9, b""):
            assert completed(server.port) == 200
        with opened(server.port, 5, half()):
            until(lambda: server.num_tasks() >= 5, "the requests")
            assert completed(server.port) == 200


def test_connections_above_the_cap_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all have a request that is running."""
    gate = threading.Event()
    parse = endpoint._parse
    monkeypatch.setattr(endpoint, "_parse", lambda *args: gate.wait(SECONDS) and parse(*args))
    body = json.dumps({"model": NAME, "prompt": "abc", "max_tokens": 1}).encode()
    with listening(max_connections=5) as server:
        with opened(server.port, 5, post("/v1/completions", body)) as held:
            until(lambda: server.state.num_requests == 5, "the requests")
            for _ in range(3):
                reply = exchange(server.port, b"")
                assert (reply.status, reply.error["code"]) == (503, "overloaded")
                assert int(reply.headers["retry-after"]) > 0
            gate.set()
            assert all(b" 200 " in answered(connection) for connection in held)
        until(lambda: get(server.port, "/health").status == 200, "room")
