"""The timing code every program shares."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowlat.bench.protocol import WARM_STEPS, Stepper, peak_memory, steps_of, token_ids


class Recorder(Stepper):
    """Writes down what it was asked."""

    vocab_size = 10

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        return {}

    def read(self, ids: Sequence[int]) -> Any:
        self.calls.append(("read", len(ids)))
        return np.zeros(10, np.float32)

    def fill(self, context: int) -> None:
        self.calls.append(("fill", context))

    def step(self, token: int, position: int) -> Any:
        self.calls.append(("step", position))
        return np.zeros(10, np.float32)

    def logits(self, ids: Sequence[int]) -> Any:
        return np.zeros((len(ids), 10), np.float32)


def test_a_prompt_is_read_whole() -> None:
    program = Recorder()
    answer = steps_of(program)["prefill"](tokens=37)
    assert program.calls == [("read", 37)]
    assert answer["seconds"] > 0 and answer["peak_bytes"] > 0


def test_steps_go_on_from_the_context_and_the_first_are_not_counted() -> None:
    program = Recorder()
    answer = steps_of(program)["decode"](context=100, steps=5, seconds=60.0)
    places = range(100, 100 + WARM_STEPS + 5)
    assert program.calls == [("fill", 100), *(("step", place) for place in places)]
    assert len(answer["step_seconds"]) == 5


def test_slow_steps_end_early_but_not_before_two() -> None:
    answer = steps_of(Recorder())["decode"](context=1, steps=30, seconds=0.0)
    assert len(answer["step_seconds"]) == 2


def test_token_ids_are_the_same_everywhere() -> None:
    """Holds shut: programs measured on different experts."""
    assert token_ids(5, 1000) == token_ids(5, 1000)
    assert all(0 <= token < 1000 for token in token_ids(500, 1000))
    assert len(set(token_ids(500, 1000))) > 300


def test_peak_memory_sees_what_was_held() -> None:
    before = peak_memory()
    block = np.ones(200_000_000 // 8)
    del block
    assert peak_memory() >= before + 100_000_000 or before == 0
