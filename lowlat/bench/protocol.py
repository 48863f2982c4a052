"""The worker's side: one JSON request a line in, one JSON answer a line out, all timing in between.

Programs are measured by the same code: `steps_of` times any `Stepper`. This file runs under other
programs' interpreters, so it needs nothing but the standard library and numpy.
"""

import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Handlers = dict[str, Callable[..., dict[str, Any]]]

WARM_STEPS = 2
"""Steps before the clock starts: the first ones after a change of context find cold memory."""
PR_SET_PDEATHSIG = 1


class Refusal(Exception):
    """This program does not measure that; the message says why, for the table."""


class Stepper(ABC):
    """A program that reads tokens and steps. Logits are numpy arrays, fp32."""

    vocab_size: int = 0

    @abstractmethod
    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        """Get ready for `context` cached tokens; facts for the report. Sets vocab_size."""

    @abstractmethod
    def read(self, ids: Sequence[int]) -> Any:
        """Empty the cache and read `ids`; logits [vocab] of the last."""

    @abstractmethod
    def fill(self, context: int) -> None:
        """Leave exactly `context` rows in the cache, whatever their values."""

    @abstractmethod
    def step(self, token: int, position: int) -> Any:
        """Read one more token; its logits [vocab]. `position` rows are cached before."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Any:
        """Empty the cache and read `ids`; logits [tokens, vocab] of all."""


def steps_of(program: Stepper) -> Handlers:
    """What a worker answers with `program`."""

    def prefill(tokens: int) -> dict[str, Any]:
        ids = token_ids(tokens, program.vocab_size)
        before = reset_peak_memory()
        start = time.perf_counter()
        program.read(ids)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_bytes": peak_memory(), "before_bytes": before}

    def decode(context: int, steps: int, seconds: float) -> dict[str, Any]:
        program.fill(context)
        ids = token_ids(WARM_STEPS + steps, program.vocab_size)
        times: list[float] = []
        for place, token in enumerate(ids):
            start = time.perf_counter()
            program.step(token, context + place)
            times.append(time.perf_counter() - start)
            counted = times[WARM_STEPS:]
            if len(counted) >= 2 and sum(counted) > seconds:
                break
        return {"step_seconds": times[WARM_STEPS:]}

    def first(ids: list[int]) -> dict[str, Any]:
        return {"token": int(program.read(ids).argmax())}

    def logits(ids: list[int], path: str) -> dict[str, Any]:
        import numpy

        numpy.save(path, numpy.asarray(program.logits(ids), dtype=numpy.float32))
        return {}

    def greedy(ids: list[int], tokens: int) -> dict[str, Any]:
        found = [int(program.read(ids).argmax())]
        while len(found) < tokens:
            position = len(ids) + len(found) - 1
            found.append(int(program.step(found[-1], position).argmax()))
        return {"ids": found}

    return {
        "load": program.load,
        "prefill": prefill,
        "decode": decode,
        "first": first,
        "logits": logits,
        "greedy": greedy,
    }


def serve(handlers: Handlers) -> None:
    """Answer requests until "quit" or the end of input. What programs print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    die_with_parent()
    for line in sys.stdin:
        request = json.loads(line)
        op = request.pop("op")
        if op == "quit":
            break
        print(json.dumps(_answer(handlers[op], request)), file=answers, flush=True)


def _answer(handler: Callable[..., dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    try:
        return handler(**request)
    except Refusal as refusal:
        return {"refused": str(refusal)}
    except ImportError as error:
        traceback.print_exc()
        return {"absent": str(error)}
    # The host is another process: whatever went wrong has to reach it as an answer.
    except Exception as error:
        traceback.print_exc()
        return {"error": str(error) or type(error).__name__, "type": type(error).__name__}


def token_ids(count: int, vocab_size: int) -> list[int]:
    """The same random ids in every program, so that experts are hit alike."""
    return random.Random(count).choices(range(vocab_size), k=count)


def reset_peak_memory() -> int:
    """Forget the peak so far; bytes resident now (0 where the system does not say)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _status_bytes("VmRSS")


def peak_memory() -> int:
    """Most bytes resident since `reset_peak_memory`."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def available_memory() -> int:
    """Bytes that can still be had without swapping; a large number where it is not known."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 1 << 60
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def die_with_parent() -> None:
    """A stopped worker does not notice a closed pipe: on Linux the kernel ends it with its host."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
