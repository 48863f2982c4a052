"""`lowlat serve minnow`: the command with the bundled trained model."""

import json
import re
import subprocess
import sys

import httpx
import pytest

from lowlat.ops import native
from tests import forked

COMMAND = [sys.executable, "-c", "from lowlat.cli.main import run; run()", "serve", "minnow"]
PATIENCE = 180.0
"""Seconds that anything may take on a machine with much else to do."""


@pytest.mark.slow
def test_it_serves_text_and_tries_drafts() -> None:
    command = [*COMMAND, "--port", "0", "--threads", "1"]
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            # It comes when connections are taken.
            greeting = server.stdout.readline()
            (url,) = re.findall(r"http://\S+", greeting)
            asked = {"model": "minnow", "prompt": "It is a truth", "max_tokens": 48}
            asked |= {"temperature": 0.0}
            whole = httpx.post(f"{url}/v1/completions", json=asked, timeout=PATIENCE).json()
            text = whole["choices"][0]["text"]
            assert whole["usage"]["completion_tokens"] == 48
            assert len(text.split()) > 10
            streamed = ""
            with httpx.stream(
                "POST", f"{url}/v1/completions", json=asked | {"stream": True}, timeout=PATIENCE
            ) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        streamed += json.loads(line[6:])["choices"][0]["text"]
            assert streamed == text
            (card,) = httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"]
            assert card["batch_invariant"] == native.available()
            metrics = httpx.get(f"{url}/metrics", timeout=PATIENCE).text
            assert counter(metrics, "num_draft_tokens") > 0
        finally:
            server.terminate()
            assert server.wait(PATIENCE) == 0


def counter(metrics: str, word: str) -> float:
    """The value of the one counter that has `word` in its name."""
    lines = [line for line in metrics.splitlines() if word in line and not line.startswith("#")]
    values = [float(line.split()[-1]) for line in lines if "_created" not in line]
    assert len(values) == 1, lines
    return values[0]
