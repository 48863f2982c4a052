"""benchmarks/soak.py: what it sends, what it holds for a fault, and that leaks show. No timing."""

import asyncio
import importlib
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest


@pytest.fixture(autouse=True)
def benchmarks_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks lie outside the package and import one another by `serving.`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "benchmarks"))


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def sample(seconds: float = 0.0, **changes: Any) -> Any:
    flat = module("serving.soak_checks").Sample(
        seconds=seconds,
        rss_bytes=1 << 30,
        descriptors=40,
        threads=9,
        processes=2,
        health=200,
        running=0.0,
        waiting=0.0,
        cache_usage=0.0,
        answered=0,
        cancelled=0,
        refused=0,
        busy=0,
    )
    return replace(flat, **changes)


def faults(**by_second: Any) -> list[str]:
    """The verdict on 100 samples of which the given fields are functions of time."""
    samples = [
        sample(5.0 * n, **{name: value(5.0 * n) for name, value in by_second.items()})
        for n in range(100)
    ]
    return module("serving.soak_checks").faults(samples, sample(), sample())


def test_flat_samples_have_no_fault() -> None:
    assert faults() == []
    # What fills while it warms up is no leak, nor is what swings.
    assert faults(rss_bytes=lambda t: (1 << 30) + int(min(t, 120) * 1e6)) == []
    assert (
        faults(descriptors=lambda t: 40 + (t // 5 % 10), threads=lambda t: 9 + (t // 5 % 3)) == []
    )


def test_connections_of_a_queue_are_no_leak() -> None:
    queue = {"descriptors": lambda t: 40 + int(t / 50), "waiting": lambda t: float(int(t / 50))}
    assert faults(**queue) == []


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rss_bytes", lambda t: (1 << 30) + int(t * 1e5), "rss_bytes grew by"),
        ("descriptors", lambda t: int(40 + t / 50), "descriptors grew by"),
        ("threads", lambda t: int(9 + t / 100), "threads grew by"),
        ("health", lambda t: 503 if t == 300 else 200, "/health was 503 after 300 s"),
    ],
)
def test_a_leak_is_a_fault(field: str, value: Any, message: str) -> None:
    (found,) = faults(**{field: value})
    assert found.startswith(message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"running": 1.0}, "1 running and 0 waiting"),
        ({"cache_usage": 0.25}, "25.00% of the KV cache is in use"),
        ({"descriptors": 45}, "descriptors when idle: 40 before, 45 after"),
        ({"health": 0}, "/health was 0"),
    ],
)
def test_what_is_held_when_idle_is_a_fault(change: dict[str, Any], message: str) -> None:
    samples = [sample(float(n)) for n in range(10)]
    (found,) = module("serving.soak_checks").faults(samples, sample(), sample(9.0, **change))
    assert message in found


def test_shares_of_the_mix_and_its_seed() -> None:
    mix = module("serving.soak_requests")

    def draw(seed: int) -> list[Any]:
        made = mix.Mix("m", seed=seed, has_chat=True, longest=9)
        return [made.draw() for _ in range(4000)]

    calls = draw(3)
    assert calls == draw(3) != draw(4)
    manners = Counter(call.manner for call in calls)
    assert 0.08 < manners["cancelled"] / 4000 < 0.12
    assert 0.04 < manners["invalid"] / 4000 < 0.06
    assert {call.path for call in calls if call.manner == "ordinary"} == {mix.CHAT, mix.COMPLETIONS}
    kinds = {call.kind for call in calls if call.manner == "invalid"}
    assert len(kinds) == 18


def test_memory_descriptors_and_threads_of_a_tree() -> None:
    """Children count: a leak may sit in a process that the server started."""
    code = (
        "import subprocess, sys, threading, time\n"
        "held = bytearray(64 << 20)\n"
        "files = [open('/dev/null') for _ in range(5)]\n"
        "waiting = threading.Event()\n"
        "for _ in range(3): threading.Thread(target=waiting.wait, daemon=True).start()\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    usage = module("serving.process").usage
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            found = usage(process.pid)
        finally:
            for member in reversed(module("serving.process").tree(process.pid)):
                subprocess.run(["kill", str(member)], check=True)
    assert found.processes == 2
    assert found.threads == 4 + 1
    assert found.rss_bytes > 64 << 20
    assert found.descriptors >= 5 + 3 + 3
    with pytest.raises(ProcessLookupError):
        usage(process.pid)


class Server:
    """Answers as the API does, save for one fault."""

    def __init__(self, fault: str = "") -> None:
        self.fault = fault
        self.canaries = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        try:
            body = json.loads(request.content)
            is_valid = isinstance(body, dict) and "prompt" in body and "wishes" not in body
        except (ValueError, RecursionError):
            body, is_valid = {}, False
        if not is_valid:
            return self.refuse()
        if body.get("logprobs") == 1:
            self.canaries += 1
        text = f"tea {self.canaries}" if self.fault == "canary" else "tea"
        count = 1 if self.fault == "lost choice" else body.get("n", 1)
        reason = "error" if self.fault == "error" else "length"
        choices = [{"index": i, "text": text, "finish_reason": reason} for i in range(count)]
        if not body.get("stream"):
            return httpx.Response(200, json={"choices": choices})
        lines = [f"data: {json.dumps({'choices': [choice]})}\n\n" for choice in choices]
        return httpx.Response(200, text="".join(lines) + "data: [DONE]\n\n")

    def refuse(self) -> httpx.Response:
        if self.fault == "accepts":
            return httpx.Response(200, json={"choices": []})
        error = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}
        return httpx.Response(
            400, json={"detail": "no"} if self.fault == "shape" else {"error": error}
        )


class ShortMix:
    """Ordinary and invalid calls in turn."""

    def __init__(self) -> None:
        mix = module("serving.soak_requests")
        good = {"prompt": "a", "n": 2}
        bodies = (good | {"stream": True}, {"wishes": 3}, good, b"[", good | {"stream": True})
        self._calls = [
            mix.Call(
                manner="ordinary" if isinstance(body, dict) and "n" in body else "invalid",
                path=mix.COMPLETIONS,
                body=body,
                kind="test",
            )
            for body in bodies
        ]
        self._drawn = 0

    def draw(self) -> Any:
        self._drawn += 1
        return self._calls[self._drawn % len(self._calls)]


def run_load(monkeypatch: pytest.MonkeyPatch, fault: str) -> Any:
    soak_load = module("serving.soak_load")
    monkeypatch.setattr(soak_load, "CANARY_SECONDS", 0.02)

    async def run() -> Any:
        transport = httpx.MockTransport(Server(fault))
        async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
            load = soak_load.Load(client, ShortMix(), "m", rate=300.0)
            await load.run(1.0)
            return load.tally

    return asyncio.run(run())


def test_right_answers_have_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    tally = run_load(monkeypatch, "")
    assert tally.faults == []
    assert tally.answered > 0 and tally.refused > 0 and tally.canaries > 1


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("canary", "canary changed"),
        ("accepts", "invalid test: HTTP 200"),
        ("shape", "invalid test: HTTP 400"),
        ("lost choice", "1 of 2 choices ended"),
        ("error", "ended by ['error']"),
    ],
)
def test_wrong_answers_are_faults(
    monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    tally = run_load(monkeypatch, fault)
    assert tally.fault_count > 0 and message in tally.faults[0]
