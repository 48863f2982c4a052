"""A server's prefix cache on disk: restarts, two servers at once, kill -9, API keys, metrics."""

import os
import random
import re
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest

from .conftest import Server, serving
from .tiny_server import NAME

pytestmark = pytest.mark.slow

PATIENCE = 120.0
"""Seconds that anything may take on a machine with much else to do."""
PROMPTS = ["".join(random.Random(seed).choices("abcdefgh ", k=700)) for seed in range(4)]


def complete(server: Server, prompt: str, *, key: str = "") -> str:
    body = {"model": NAME, "prompt": prompt, "max_tokens": 20, "ignore_eos": True, "seed": 5}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{server.url}/v1/completions"
    response = httpx.post(url, json=body, headers=headers, timeout=PATIENCE)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def metric(server: Server, name: str, *, key: str = "") -> float:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    text = httpx.get(f"{server.url}/metrics", headers=headers, timeout=PATIENCE).text
    found = re.findall(rf"^lowlat:prefix_cache_disk_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


def pages(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*/*/*") if len(path.name) == 64]


def test_a_restarted_server_and_its_neighbour_read_the_pages(tmp_path: Path) -> None:
    with serving() as server:
        expected = complete(server, PROMPTS[0])
        assert metric(server, "written_bytes_total") == 0
    options = ("--prefix-cache-dir", str(tmp_path))
    with serving(*options) as server:
        assert complete(server, PROMPTS[0]) == expected
    assert pages(tmp_path)
    with serving(*options) as first, serving(*options) as second:
        for server in (first, second):
            assert complete(server, PROMPTS[0]) == expected
            assert metric(server, "hits_total") >= 512
            assert metric(server, "read_bytes_total") > 0
            assert metric(server, "dropped_total") == 0


def test_api_keys_share_nothing_on_disk(tmp_path: Path) -> None:
    keys = ["first-integration-key", "second-integration-key"]
    options = ["--prefix-cache-dir", str(tmp_path), "--key", keys[0], "--key", keys[1]]
    with serving(*options) as server:
        expected = complete(server, PROMPTS[0], key=keys[0])
    with serving(*options) as server:
        assert complete(server, PROMPTS[0], key=keys[1]) == expected
        assert metric(server, "hits_total", key=keys[0]) == 0
        assert complete(server, PROMPTS[0], key=keys[0]) == expected
        assert metric(server, "hits_total", key=keys[0]) >= 512
    names = " ".join(str(path) for path in tmp_path.rglob("*"))
    assert not any(key in names or key.encode().hex() in names for key in keys)
    assert not any(key.encode() in path.read_bytes() for key in keys for path in pages(tmp_path))


def test_kill_9_at_any_moment_changes_no_token(tmp_path: Path) -> None:
    """Two servers on one folder are killed again and again while they write and read."""
    with serving() as server:
        expected = [complete(server, prompt) for prompt in PROMPTS]
    options = ("--prefix-cache-dir", str(tmp_path))
    chance = random.Random(7)
    answers: list[tuple[str, str]] = []
    for _ in range(6):
        with ExitStack() as stack:
            servers = [stack.enter_context(suppress_exit(serving(*options))) for _ in range(2)]
            clients = [
                threading.Thread(target=ask_until_it_ends, args=(server, answers))
                for server in servers
            ]
            for client in clients:
                client.start()
            for server in servers:
                time.sleep(chance.uniform(0.0, 0.7))
                server.process.kill()
            for client in clients:
                client.join(PATIENCE)
    assert set(answers) <= set(zip(PROMPTS, expected, strict=True))
    with serving(*options) as server:
        assert [complete(server, prompt) for prompt in PROMPTS] == expected
    for path in tmp_path.rglob("*.partial"):
        os.utime(path, (0, 0))
    with serving(*options) as server:
        assert [complete(server, prompt) for prompt in PROMPTS] == expected
        assert metric(server, "hits_total") >= 4 * 512
    assert not list(tmp_path.rglob("*.partial"))


class suppress_exit:
    """A server that may end by a signal."""

    def __init__(self, running) -> None:
        self._running = running

    def __enter__(self) -> Server:
        return self._running.__enter__()

    def __exit__(self, *failure: object) -> None:
        with suppress(AssertionError):
            self._running.__exit__(*failure)


def ask_until_it_ends(server: Server, answers: list[tuple[str, str]]) -> None:
    """Collect every answer that comes whole."""
    with suppress(httpx.HTTPError):
        while True:
            answers.extend((prompt, complete(server, prompt)) for prompt in PROMPTS)
