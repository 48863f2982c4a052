"""The server process: misbehaving connections and shutdown."""

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lowlat.serve.protocol.limits import MAX_HEADER_BYTES

from .conftest import Server, serving
from .tiny_server import NAME

LONG = {"model": NAME, "prompt": "x", "max_tokens": 1900, "ignore_eos": True}
SHORT = {"model": NAME, "prompt": "x", "max_tokens": 2}
ENDLESS = {**LONG, "max_tokens": 60_000}
"""Takes a minute where nothing else runs, and no test waits for its end."""
ROOM = ("--context", "65536")
PATIENCE = 120.0
"""Seconds that anything may take on a machine with much else to do; ten times what it should."""
IMPATIENCE = 1.0


@pytest.fixture(scope="module")
def server() -> Any:
    """A server without a key, and with little patience."""
    with serving("--header-seconds", f"{IMPATIENCE}", "--body-seconds", f"{IMPATIENCE}") as running:
        yield running


def talk(server: Server, data: bytes) -> bytes:
    """Everything the server answers to `data` until it closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        answer = b""
        # A server that has said all it has to say may reset what still comes.
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                answer += part
        return answer


def get(server: Server, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=PATIENCE)


def complete(server: Server, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE)


def error_in(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error object of a raw response."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]


def post(body: bytes, *, length: int | None = None) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % (len(body) if length is None else length)
    ) + body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 408),
        (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow:", 408),
        (post(b"{", length=100), 408),
        (b"\x16\x03\x01 this is TLS\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * (2 * MAX_HEADER_BYTES), 431),
        (post(b"", length=1 << 40), 413),
        (b"GET /health HTTP/1.0\r\n\r\n", 403),
    ],
)
def test_bad_connections_are_answered_and_closed(server: Server, data: bytes, status: int) -> None:
    found, error = error_in(talk(server, data))
    assert found == status
    assert set(error) == {"message", "type", "param", "code"}
    assert get(server, "/health").status_code == 200


@pytest.mark.slow
def test_a_second_request_may_come_late_but_not_slowly(server: Server) -> None:
    """Regression: a header timeout that cuts keep-alive connections, or misses the next one."""
    get = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as connection:
        for _ in range(2):
            connection.sendall(get + b"\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert b"200 OK" in answer
            time.sleep(1.2 * IMPATIENCE)
        connection.sendall(get)
        assert b" 408 " in connection.recv(65536)
        assert connection.recv(65536) == b""


@pytest.mark.slow
def test_an_answer_may_take_longer_than_headers_may(server: Server) -> None:
    answer = complete(server, LONG)
    assert answer.json()["usage"]["completion_tokens"] == 1900


def test_the_server_does_not_name_itself(server: Server) -> None:
    assert "server" not in get(server, "/health").headers


def test_pages_of_the_engine_come_back_after_clients_left(server: Server) -> None:
    for _ in range(10):
        with streaming(server, LONG):
            pass
    until = time.monotonic() + PATIENCE
    while 'num_requests_running{model_name="tiny"} 0.0' not in get(server, "/metrics").text:
        assert time.monotonic() < until, "generations of clients that left still run"
        time.sleep(0.02)


def start(
    server: Server, body: dict[str, Any]
) -> tuple[threading.Thread, list[httpx.Response | Exception]]:
    """Send `body` from a thread of its own; returns when it runs."""
    answers: list[httpx.Response | Exception] = []

    def send() -> None:
        try:
            answers.append(complete(server, body))
        except httpx.HTTPError as error:
            answers.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    while 'num_requests_running{model_name="tiny"} 1.0' not in get(server, "/metrics").text:
        assert not answers, answers
    return thread, answers


@contextlib.contextmanager
def streaming(server: Server, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The lines of a started stream; leaving the context disconnects."""
    url, body = f"{server.url}/v1/completions", {**body, "stream": True}
    with httpx.stream("POST", url, json=body, timeout=PATIENCE) as stream:
        lines = stream.iter_lines()
        next(lines)
        yield lines


@pytest.mark.slow
def test_draining_finishes_what_runs_and_refuses_what_is_new() -> None:
    with serving("--drain-seconds", f"{PATIENCE}", *ROOM) as server:
        thread, answers = start(server, LONG)
        # It is there for as long as this stream is read.
        with streaming(server, ENDLESS):
            server.process.send_signal(signal.SIGTERM)
            while get(server, "/ready").status_code == 200:
                time.sleep(0.01)
            refused = complete(server, SHORT)
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) > 0
            assert get(server, "/health").status_code == 200
            thread.join()
        (answer,) = answers
        assert isinstance(answer, httpx.Response)
        assert answer.json()["usage"]["completion_tokens"] == 1900


@pytest.mark.slow
def test_requests_that_outlast_the_drain_get_an_error() -> None:
    with serving("--drain-seconds", "0.1", *ROOM) as server:
        thread, answers = start(server, ENDLESS)
        server.process.send_signal(signal.SIGTERM)
        thread.join()
        (answer,) = answers
        assert isinstance(answer, httpx.Response)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"


@pytest.mark.parametrize(
    "second", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_second_signal_ends_at_once(second: signal.Signals) -> None:
    """Regression: status 500, a stream that only breaks off, and tracebacks in the log."""
    with serving("--drain-seconds", "3600", *ROOM) as server:
        thread, answers = start(server, ENDLESS)
        with streaming(server, ENDLESS) as lines:
            server.process.send_signal(signal.SIGTERM)
            while '"draining"' not in server.logged():
                time.sleep(0.01)
            server.process.send_signal(second)
            *_, last = [line for line in lines if line]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "shutting_down")
        thread.join()
        (answer,) = answers
        assert isinstance(answer, httpx.Response)
        assert answer.status_code == 503
        assert answer.json() == {"error": error}
        assert server.process.wait(PATIENCE) == 0
        records = [json.loads(line) for line in server.logged().splitlines()]
        assert [record for record in records if record["level"] == "error"] == []


def test_without_native_kernels_the_log_says_what_that_means(server: Server) -> None:
    """The tiny model computes in fp32, for which there are none."""
    assert "not batch-invariant: tokens may depend on batch composition" in server.logged()
