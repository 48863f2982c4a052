"""`lowlat serve` with two models: on demand, within the memory, the same tokens as each alone."""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpx
import pytest

import lowlat
from lowlat.ops import native
from tests import forked

COMMAND = [sys.executable, "-c", "from lowlat.cli.main import run; run()", "serve"]
PATIENCE = 180.0
"""Seconds that anything may take on a machine with much else to do."""
PROMPT = "It is a truth universally acknowledged"
DTYPES = {"minnow": "bf16", "small": "int8"}
GIB = 0.05
"""For the KV cache of each."""


def ask(url: str, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 32, "temperature": 0.0, "logprobs": 1}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return {"text": choice["text"], "logprobs": choice["logprobs"]["token_logprobs"]}


def states(url: str) -> dict[str, str]:
    cards = httpx.get(f"{url}/v1/models", timeout=PATIENCE).json()["data"]
    return {card["id"]: card["state"] for card in cards}


def alone(dtype: str) -> dict[str, Any]:
    """The answer of the model loaded by itself."""
    model = lowlat.load("minnow", dtype=dtype, max_cache_bytes=int(GIB * 2**30))
    completion = model.generate(PROMPT, max_tokens=32, temperature=0.0, logprobs=1)
    assert isinstance(completion, lowlat.Completion)
    logprobs = [token.logprob for token in completion.logprobs]
    return {"text": completion.text, "logprobs": logprobs}


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["0.5", "0.09"])
def test_each_model_answers_as_it_does_alone(memory: str) -> None:
    """With memory for both at once, and for one at a time."""
    expected = {name: alone(dtype) for name, dtype in DTYPES.items()}
    command = [
        *COMMAND, "minnow", "--model", f"small=minnow@dtype=int8,cache_memory={GIB}", "--port", "0",
        "--threads", "1", "--memory", memory, "--cache-memory", str(GIB),
    ]  # fmt: skip
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            (url,) = re.findall(r"http://\S+", server.stdout.readline())
            assert states(url) == {"minnow": "unloaded", "small": "unloaded"}
            for _ in range(2):
                with ThreadPoolExecutor() as pool:
                    found = dict(zip(DTYPES, pool.map(partial(ask, url), DTYPES), strict=True))
                assert {name: answer["text"] for name, answer in found.items()} == {
                    name: answer["text"] for name, answer in expected.items()
                }
                if native.available():
                    assert found == expected
            ready = [name for name, state in states(url).items() if state == "ready"]
            assert len(ready) == (2 if memory == "0.5" else 1)
        finally:
            server.terminate()
            assert server.wait(PATIENCE) == 0
