"""Heavy bodies: none holds up the event loop, and none takes much memory.

The time is the processor time of the thread that holds the interpreter's lock, so a busy machine
does not change the result.
"""

import asyncio
import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lowlat.config.hf.sentence_transformers import Pooling
from lowlat.generate.model import Model
from tests.fakes import ScriptedModel, gqa_config
from tests.unit.serve.templates import tokenizer_of

from .cases import (
    CHAT,
    COMPLETIONS,
    COUNT_TOKENS,
    EMBEDDINGS,
    MESSAGES,
    OLLAMA_CHAT,
    OLLAMA_EMBED,
    OLLAMA_GENERATE,
    RESPONSES,
    TOKENIZE,
)
from .heavy_bodies import HEAVY, NAME, long_text, long_tools
from .local import Local, counting_model, listening, until
from .wire import exchange, post

HOLD_SECONDS = 0.1
EXTRA_BYTES = 100 << 20
REPEATS = 3
MEAN = Pooling(mode="mean", normalize=True)


@contextlib.contextmanager
def frozen(model: Model) -> Iterator[Local]:
    """A server; garbage collections leave out what other tests have left."""
    with listening(model) as running:
        gc.collect()
        gc.freeze()
        try:
            yield running
        finally:
            gc.unfreeze()


@pytest.fixture(scope="module")
def generating() -> Iterator[Local]:
    with frozen(counting_model()) as running:
        yield running


@pytest.fixture(scope="module")
def embedding() -> Iterator[Local]:
    with frozen(counting_model(pooling=MEAN)) as running:
        yield running


@pytest.fixture
def server(request: pytest.FixtureRequest, name: str) -> Local:
    """Of a model that answers the body `name`."""
    path, _ = HEAVY[name]
    return request.getfixturevalue("embedding" if "embed" in path else "generating")


class Holds:
    """Longest processor time that one thread takes between two turns of the event loop."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._last: dict[int, float] = {}

    async def watch(self) -> None:
        while True:
            self._look()
            await asyncio.sleep(0.001)

    def _look(self) -> None:
        now: dict[int, float] = {}
        for thread in threading.enumerate():
            # The thread may have ended by now.
            with contextlib.suppress(OSError):
                if thread.ident is not None and thread is not threading.main_thread():
                    clock = time.pthread_getcpuclockid(thread.ident)
                    now[thread.ident] = time.clock_gettime(clock)
        spent = [now[ident] - self._last[ident] for ident in now.keys() & self._last.keys()]
        self.longest = max(self.longest, *spent, 0.0)
        self._last = now


@contextlib.contextmanager
def watched(server: Local) -> Iterator[Holds]:
    holds = Holds()
    watching = asyncio.run_coroutine_threadsafe(holds.watch(), server.loop)
    try:
        yield holds
    finally:
        watching.cancel()


def least_hold(server: Local, data: bytes, statuses: set[int], code: str | None = None) -> float:
    """Seconds, the least of up to REPEATS requests. `code`: of all errors."""
    # A body that holds the loop does so each time. Other holds are rare: what the first request
    # prepares, a garbage collection, and more work between two turns of a loop that a busy machine
    # scheduled late.
    found: list[float] = []
    while len(found) < REPEATS and min(found, default=HOLD_SECONDS) >= HOLD_SECONDS:
        with watched(server) as holds:
            reply = exchange(server.port, data)
        assert reply.status in statuses, reply
        assert code is None or reply.error["code"] == code, reply
        until(lambda: server.is_idle, "the end")
        found.append(holds.longest)
    return min(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HEAVY))
def test_no_body_holds_up_the_event_loop(server: Local, name: str) -> None:
    """Regression: one body of unknown fields that stalled all streams for seconds."""
    path, make = HEAVY[name]
    assert least_hold(server, post(path, make()), {200, 400}) < HOLD_SECONDS


@pytest.mark.slow
@pytest.mark.parametrize(("context", "characters"), [(512, 3_600_000), (400_000, 400_000)])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, OLLAMA_CHAT])
def test_no_text_holds_up_the_event_loop(path: str, context: int, characters: int) -> None:
    """Regression: descriptions of tools whose tokenization stalled /health for ten seconds."""
    data = post(path, long_tools(path, characters))
    config = gqa_config(max_position_embeddings=context)
    model = Model(ScriptedModel(config, lambda token: token), tokenizer_of("hermes"), name=NAME)
    with frozen(model) as running:
        assert least_hold(running, data, {400}) < HOLD_SECONDS


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


@pytest.mark.slow
@pytest.mark.parametrize("name", list(HEAVY))
def test_no_body_takes_much_memory(server: Local, name: str) -> None:
    """Regression: one body whose errors took 1.5 GB."""
    path, make = HEAVY[name]
    check_memory(server, post(path, make()))


def check_memory(server: Local, data: bytes) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("the kernel does not reset the peak of a process's memory")
    before = peak_bytes()
    exchange(server.port, data)
    until(lambda: server.is_idle, "the end")
    # This process is also the client, which holds the request twice.
    assert peak_bytes() - before < EXTRA_BYTES + 3 * len(data)


TEXTS = {
    "words": "ab " * 1_230_000,
    "one word": "a" * 3_700_000,
    "control": "<|im_end|> " * 330_000,
}
"""Texts of one-byte tokens."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "kind"),
    [
        *((CHAT, kind) for kind in TEXTS),
        *((path, "one word") for path in (COMPLETIONS, TOKENIZE)),
        *((path, "words") for path in (RESPONSES, MESSAGES, COUNT_TOKENS, OLLAMA_CHAT)),
        *((path, "words") for path in (OLLAMA_GENERATE, EMBEDDINGS, OLLAMA_EMBED)),
    ],
)
def test_no_text_is_encoded_as_a_whole(path: str, kind: str) -> None:
    """Regression: 3.7 MB of one-byte tokens that took 1.9 GB, and the interpreter's lock for 0.7 s,
    where the context is large."""
    data = post(path, long_text(path, TEXTS[kind]))
    config = gqa_config(max_position_embeddings=200_000)
    pooling = MEAN if path in (EMBEDDINGS, OLLAMA_EMBED) else None
    scripted = ScriptedModel(config, lambda token: token)
    model = Model(scripted, tokenizer_of("hermes"), name=NAME, pooling=pooling)
    with frozen(model) as running:
        hold = least_hold(running, data, {400}, code="context_length_exceeded")
        check_memory(running, data)
    assert hold < HOLD_SECONDS
