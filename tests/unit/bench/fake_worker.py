"""A program under test's control, run as a worker: 512 tokens, logits that follow the last one."""

import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lowlat.bench.protocol import Refusal, Stepper, serve, steps_of

VOCAB = 512


class Fake(Stepper):
    """Refuses prompts of 13 tokens, prints where programs print, obeys `model` as a mood."""

    vocab_size = VOCAB

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        print("a program's own chatter on stdout")
        return {"precision": precision, "threads": os.environ["OMP_NUM_THREADS"]}

    def read(self, ids: Sequence[int]) -> Any:
        if len(ids) == 13:
            raise Refusal("thirteen is too many")
        return self._row(ids[-1])

    def fill(self, context: int) -> None:
        pass

    def step(self, token: int, position: int) -> Any:
        return self._row(token)

    def logits(self, ids: Sequence[int]) -> Any:
        return np.stack([self._row(token) for token in ids])

    def _row(self, token: int) -> Any:
        return np.eye(VOCAB, dtype=np.float32)[(token + 1) % VOCAB]


def fail(kind: str) -> dict[str, Any]:
    if kind == "exit":
        print("the reason for its end", file=sys.stderr, flush=True)
        os._exit(3)
    if kind == "hang":
        time.sleep(60)
    if kind == "absent":
        raise ImportError("no module named fake")
    if kind == "user":
        raise UserError("dtype 'x' is unknown; choose another")
    raise RuntimeError("first line\nsecond line")


class UserError(ValueError):
    """The name is what counts between processes."""


if __name__ == "__main__":
    serve(steps_of(Fake()) | {"fail": fail})
