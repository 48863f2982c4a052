"""`lowlat serve minnow`: the command itself, with the trained model that comes along."""

import json
import socket
import subprocess
import sys
import time

import httpx
import pytest

from lowlat.ops import native

COMMAND = [sys.executable, "-c", "from lowlat.cli.main import run; run()", "serve", "minnow"]


def test_it_serves_text_and_tries_drafts() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([*COMMAND, "--port", str(port), "--threads", "1"]) as server:
        try:
            wait_until_ready(server, url)
            asked = {"model": "minnow", "prompt": "It is a truth", "max_tokens": 48}
            asked |= {"temperature": 0.0}
            whole = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
            text = whole["choices"][0]["text"]
            assert whole["usage"]["completion_tokens"] == 48
            assert len(text.split()) > 10
            streamed = ""
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=asked | {"stream": True}, timeout=60
            ) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        streamed += json.loads(line[6:])["choices"][0]["text"]
            assert streamed == text
            (card,) = httpx.get(f"{url}/v1/models").json()["data"]
            assert card["batch_invariant"] == native.available()
            metrics = httpx.get(f"{url}/metrics").text
            assert counter(metrics, "num_draft_tokens") > 0
        finally:
            server.terminate()
            assert server.wait(20) == 0


def wait_until_ready(server: subprocess.Popen[bytes], url: str) -> None:
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(f"the server ended with {server.returncode}")
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    pytest.fail("the server was not ready within a minute")


def counter(metrics: str, word: str) -> float:
    """The value of the one counter that has `word` in its name."""
    lines = [line for line in metrics.splitlines() if word in line and not line.startswith("#")]
    values = [float(line.split()[-1]) for line in lines if "_created" not in line]
    assert len(values) == 1, lines
    return values[0]
