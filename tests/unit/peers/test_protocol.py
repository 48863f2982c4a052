"""The timing code every program shares."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lowlat.peers.protocol import (
    LONGEST_ERROR,
    WARMUP_STEPS,
    TimedModel,
    one_line,
    peak_memory,
    random_token_ids,
    timed_handlers,
)


class Recorder(TimedModel):
    """Records its calls."""

    vocab_size = 10

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def load(
        self, *, model: str, precision: str, cache: str, threads: int, context: int
    ) -> dict[str, Any]:
        return {}

    def prefill(self, ids: Sequence[int]) -> Any:
        self.calls.append(("prefill", len(ids)))
        return np.zeros(10, np.float32)

    def fill_cache(self, context: int) -> None:
        self.calls.append(("fill_cache", context))

    def decode_step(self, token: int, position: int) -> Any:
        self.calls.append(("decode_step", position))
        return np.zeros(10, np.float32)

    def logits(self, ids: Sequence[int]) -> Any:
        return np.zeros((len(ids), 10), np.float32)


def test_prefill_runs_the_whole_prompt() -> None:
    program = Recorder()
    answer = timed_handlers(program)["prefill"](tokens=37)
    assert program.calls == [("prefill", 37)]
    assert answer["seconds"] > 0 and answer["peak_bytes"] > 0


def test_decode_continues_from_the_context_and_skips_warmup_steps() -> None:
    program = Recorder()
    answer = timed_handlers(program)["decode"](context=100, steps=5, seconds=60.0)
    places = range(100, 100 + WARMUP_STEPS + 5)
    assert program.calls == [("fill_cache", 100), *(("decode_step", place) for place in places)]
    assert len(answer["step_seconds"]) == 5


def test_slow_steps_end_early_but_not_before_two() -> None:
    answer = timed_handlers(Recorder())["decode"](context=1, steps=30, seconds=0.0)
    assert len(answer["step_seconds"]) == 2


def test_random_token_ids_are_the_same_everywhere() -> None:
    """Regression: programs measured on different experts."""
    assert random_token_ids(5, 1000) == random_token_ids(5, 1000)
    assert all(0 <= token < 1000 for token in random_token_ids(500, 1000))
    assert len(set(random_token_ids(500, 1000))) > 300


def test_peak_memory_sees_what_was_held() -> None:
    before = peak_memory()
    block = np.ones(200_000_000 // 8)
    del block
    assert peak_memory() >= before + 100_000_000 or before == 0


def test_long_errors_are_cut_after_the_type() -> None:
    line = one_line(ValueError("x" * 9999))
    assert line.startswith("ValueError: xx") and line.endswith("...") and len(line) == LONGEST_ERROR
