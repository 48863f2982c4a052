"""Replicas on Ray Serve: prefix-aware routing, a replica killed under load, and a drain."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from .ray_program import KEY, NAME

pytestmark = pytest.mark.slow

PATIENCE = 300.0
"""Seconds that anything may take on a machine with much else to do."""
CONVERSATIONS, TURNS = 3, 4
HEADERS = {"Authorization": f"Bearer {KEY}"}


@dataclass
class Application:
    """Ray and the application in a process group of their own."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def order(self, order: Any) -> Any:
        """What the program answers to an order of ray_program."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{json.dumps(order)}\n")
        self.process.stdin.flush()
        return json.loads(self.answer())

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-6000:]
        return line

    def replicas(self) -> list[int]:
        """Process ids of the replicas."""
        return [pid for pid in _descendants(self.process.pid) if b":Replica" in _command_line(pid)]

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=HEADERS, timeout=PATIENCE)


def _command_line(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _descendants(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from _descendants(child)


@pytest.fixture(scope="module")
def application() -> Iterator[Application]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    paths = [str(root), os.environ.get("PYTHONPATH")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with tempfile.NamedTemporaryFile("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.server.ray_program", str(port)],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            started = Application(process, f"http://127.0.0.1:{port}", Path(log.name))
            assert started.answer() == "ready\n"
            yield started
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(PATIENCE) == 0, Path(log.name).read_text()[-6000:]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                stream.close()


def chat(messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "messages": messages, "max_tokens": 8, "temperature": 0} | fields


def ask(client: httpx.Client, messages: list[dict[str, str]], **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json=chat(messages, **fields))
    assert response.status_code == 200, response.text
    return response.json()


def hit_rate(complete: Callable[[list[dict[str, str]]], dict[str, Any]], seed: int) -> float:
    """Part of the prompt tokens of interleaved conversations that the prefix cache has."""
    rng = random.Random(seed)
    words = ["fish", "river", "stone", "bird", "moon", "tree"]
    cached = tokens = 0
    talks: list[list[dict[str, str]]] = [[] for _ in range(CONVERSATIONS)]
    for turn in range(TURNS):
        for talk in talks:
            talk.append({"role": "user", "content": " ".join(rng.choices(words, k=120))})
            found = complete(talk)
            talk.append(found["choices"][0]["message"])
            if turn:
                cached += found["usage"]["prompt_tokens_details"]["cached_tokens"]
                tokens += found["usage"]["prompt_tokens"]
    return cached / tokens


def in_turn(application: Application) -> Callable[[list[dict[str, str]]], dict[str, Any]]:
    """Completes by one replica, then by the other (round robin)."""
    last: list[str] = []

    def complete(messages: list[dict[str, str]]) -> dict[str, Any]:
        found = application.order({"body": chat(messages), "tried": last})
        assert found["status"] == 200 and [found["replica"]] != last, found
        last[:] = [found["replica"]]
        return found["body"]

    return complete


@dataclass
class Load:
    """Clients that send requests until the block ends; every failure is recorded."""

    url: str
    done: int = 0
    failures: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Load":
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(3)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self.url, headers=HEADERS, timeout=PATIENCE) as client:
            count = 0
            while not self._stop.is_set():
                count += 1
                question = [{"role": "user", "content": f"Client {number} asks {count}."}]
                try:
                    ask(client, question, max_tokens=20, ignore_eos=True)
                    self.done += 1
                except (AssertionError, httpx.HTTPError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                self._stop.wait(0.2)

    def wait_for(self, more: int) -> None:
        until(lambda number=self.done + more: self.done >= number or bool(self.failures))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_replicas(application: Application) -> None:
    """One test, as Ray takes much longer to start than all requests."""
    with application.client() as client:
        by_prefix = hit_rate(lambda messages: ask(client, messages), seed=1)
        round_robin = hit_rate(in_turn(application), seed=2)
        print(f"prefix cache hit rate: {by_prefix:.3f}, round robin {round_robin:.3f}")
        assert by_prefix > 0.5 and by_prefix > 1.5 * round_robin
        check_http(client)

        killed, _ = application.replicas()
        with Load(application.url) as load:
            load.wait_for(3)
            os.kill(killed, signal.SIGKILL)
            load.wait_for(10)
            until(lambda: len(serving(client)) == 2 or bool(load.failures))
            load.wait_for(3)
        assert load.failures == []
        assert killed not in application.replicas()

        story = [{"role": "user", "content": "Tell a long story."}]
        with ThreadPoolExecutor() as pool:
            running = pool.submit(ask, client, story, max_tokens=200, n=4, ignore_eos=True)
            until(lambda: running.done() or num_running(application) > 0)
            assert application.order("delete") == "deleted"
            assert running.result()["usage"]["completion_tokens"] == 800


def serving(client: httpx.Client) -> set[str]:
    """Replicas that serve, by their metrics."""
    lines = client.get("/metrics").text.splitlines()
    return {line.split()[0] for line in lines if line.startswith("lowlat:engine_steps_total")}


def num_running(application: Application) -> float:
    with application.client() as client:
        lines = client.get("/metrics").text.splitlines()
    name = "lowlat:num_requests_running{"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def check_http(client: httpx.Client) -> None:
    """The gateway changes nothing but the place."""
    assert client.get("/metrics").text.count("# TYPE lowlat:engine_steps_total counter") == 1
    assert client.get("/v1/models", headers={"Authorization": "Bearer x"}).status_code == 401
    assert client.get("/metrics", headers={"Authorization": "Bearer x"}).status_code == 401
    assert client.get("/nothing").status_code == 404
    assert client.post("/v1/completions", content=b"x" * (9 * 2**20)).status_code == 413
    body = {"model": NAME, "prompt": "Once", "max_tokens": 5, "stream": True, "seed": 1}
    with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]" and len(lines) > 2
    whole = client.post("/v1/completions", json=body | {"stream": False}).json()
    texts = [json.loads(line)["choices"][0]["text"] for line in lines[:-1]]
    assert "".join(texts) == whole["choices"][0]["text"]
    # A stored response is on one replica; the next request finds it, whichever gets it first.
    for number in range(4):
        first = client.post("/v1/responses", json={"model": NAME, "input": f"Tale {number}"}).json()
        assert client.get(f"/v1/responses/{first['id']}").json()["id"] == first["id"]
