"""Worker process protocol, worker side: JSON requests on stdin, JSON answers on stdout, all timing.

`timed_handlers` times any `TimedModel`, so the same code measures every program. This module runs
under other programs' interpreters, so it imports only the standard library and numpy.
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

WARMUP_STEPS = 2
"""Untimed decode steps before a sample, as the first ones after a cache fill run on cold memory."""
LONGEST_ERROR = 300
"""Maximum characters of an exception in an answer."""
PR_SET_PDEATHSIG = 1


class Unsupported(Exception):
    """The program does not support a request; the message is the reason shown to the user."""


class TimedModel(ABC):
    """A model of one sequence that a benchmark times. Logits are numpy arrays, fp32."""

    vocab_size: int = 0

    @abstractmethod
    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        """Load `model` for up to `context` cached tokens and set vocab_size; facts for the report.

        precision: of the weights. cache: data type of the KV cache. threads: of the program's
        own thread pool; those of PyTorch and numpy follow the environment that the host sets.
        """

    @abstractmethod
    def prefill(self, ids: Sequence[int]) -> Any:
        """Clear the KV cache and run `ids`; logits [vocab] of the last token."""

    @abstractmethod
    def fill_cache(self, context: int) -> None:
        """Leave exactly `context` entries in the KV cache, of any values."""

    @abstractmethod
    def decode_step(self, token: int, position: int) -> Any:
        """Run one token after `position` cached ones; its logits [vocab]."""

    @abstractmethod
    def logits(self, ids: Sequence[int]) -> Any:
        """Clear the KV cache and run `ids`; logits [tokens, vocab] of all."""


def timed_handlers(model: TimedModel) -> Handlers:
    """The requests that a worker with `model` answers."""

    def prefill(tokens: int) -> dict[str, Any]:
        ids = random_token_ids(tokens, model.vocab_size)
        before = reset_peak_memory()
        start = time.perf_counter()
        model.prefill(ids)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "peak_bytes": peak_memory(), "before_bytes": before}

    def decode(context: int, steps: int, seconds: float) -> dict[str, Any]:
        model.fill_cache(context)
        ids = random_token_ids(WARMUP_STEPS + steps, model.vocab_size)
        times: list[float] = []
        for offset, token in enumerate(ids):
            start = time.perf_counter()
            model.decode_step(token, context + offset)
            times.append(time.perf_counter() - start)
            counted = times[WARMUP_STEPS:]
            if len(counted) >= 2 and sum(counted) > seconds:
                break
        return {"step_seconds": times[WARMUP_STEPS:]}

    def first_token(ids: list[int]) -> dict[str, Any]:
        return {"token": int(model.prefill(ids).argmax())}

    def logits(ids: list[int], path: str) -> dict[str, Any]:
        import numpy

        numpy.save(path, numpy.asarray(model.logits(ids), dtype=numpy.float32))
        return {}

    return {
        "load": model.load,
        "prefill": prefill,
        "decode": decode,
        "first_token": first_token,
        "logits": logits,
    }


def serve_requests(handlers: Handlers) -> None:
    """Answer requests until "quit" or the end of input. The program's stdout goes to stderr."""
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
    except Unsupported as error:
        return {"unsupported": str(error)}
    except ImportError as error:
        traceback.print_exc()
        return {"not_installed": str(error)}
    # Every exception is sent to the host process as an answer.
    except Exception as error:
        traceback.print_exc()
        kind = type(error).__name__
        return {"user_error": str(error)} if kind == "UserError" else {"error": one_line(error)}


def one_line(error: BaseException) -> str:
    """An exception of a peer in one line, its type first."""
    words = " ".join([f"{type(error).__name__}:", *str(error).split()])
    if len(words) <= LONGEST_ERROR:
        return words.removesuffix(":")
    return f"{words[: LONGEST_ERROR - 3]}..."


def random_token_ids(count: int, vocab_size: int) -> list[int]:
    """Random ids, equal in every program, so that all programs route to the same experts."""
    return random.Random(count).choices(range(vocab_size), k=count)


def reset_peak_memory() -> int:
    """Reset the peak resident size; bytes resident now (0 where Linux's /proc is missing)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0
    return _proc_bytes("self/status", "VmRSS") or 0


def peak_memory() -> int:
    """Peak resident bytes since `reset_peak_memory`."""
    return _proc_bytes("self/status", "VmHWM") or 0


def available_memory() -> int:
    """Bytes available without swapping; 2^60 where Linux's /proc is missing."""
    return _proc_bytes("meminfo", "MemAvailable") or 1 << 60


def _proc_bytes(file: str, field: str) -> int | None:
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


def die_with_parent() -> None:
    """On Linux, let the kernel end this process with its host, because a stopped process (SIGSTOP)
    does not notice a closed pipe.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
