"""A fake program that runs as a worker: 512 tokens, logits that depend on the last token."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowlat.peers.protocol import TimedModel, Unsupported, serve_requests, timed_handlers

VOCAB = 512


class Fake(TimedModel):
    """Does not support prompts of 13 tokens; prints to stdout, as programs do."""

    vocab_size = VOCAB

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        print("output of the program on stdout")
        return {"precision": precision, "threads": os.environ["OMP_NUM_THREADS"]}

    def prefill(self, ids: Sequence[int]) -> Any:
        if len(ids) == 13:
            raise Unsupported("thirteen is too many")
        return self._row(ids[-1])

    def fill_cache(self, context: int) -> None:
        pass

    def decode_step(self, token: int, position: int) -> Any:
        return self._row(token)

    def logits(self, ids: Sequence[int]) -> Any:
        return np.stack([self._row(token) for token in ids])

    def _row(self, token: int) -> Any:
        return np.eye(VOCAB, dtype=np.float32)[(token + 1) % VOCAB]


def fail(kind: str) -> dict[str, Any]:
    if kind == "exit":
        print("the reason for its end", file=sys.stderr, flush=True)
        os._exit(3)
    if kind == "abort":
        os.abort()
    if kind == "hang":
        time.sleep(60)
    if kind == "absent":
        raise ImportError("no module named fake")
    if kind == "user":
        raise UserError("dtype 'x' is unknown; choose another")
    if kind == "memory":
        raise MemoryError
    raise RuntimeError("first line\nsecond line")


class UserError(ValueError):
    """Recognised by its name: the worker's interpreter may have another lowlat."""


if __name__ == "__main__":
    serve_requests(timed_handlers(Fake()) | {"fail": fail})
