"""Bubble formulas against a simulated pipeline and against numbers put in by hand."""

import pytest

from lowlat.plan.bubble import StageTimes, bubble_seconds, in_flight
from lowlat.plan.job import ParallelLayout


def simulated_1f1b(pipeline: int, micro_batches: int, forward: float, backward: float) -> float:
    """Seconds of a step in which every stage does min(pipeline - rank, m) forward passes first and
    then alternates.
    """
    orders = []
    for rank in range(pipeline):
        warm = min(pipeline - rank - 1, micro_batches)
        order = [("F", index) for index in range(warm)]
        for index in range(micro_batches - warm):
            order += [("F", warm + index), ("B", index)]
        order += [("B", index) for index in range(micro_batches - warm, micro_batches)]
        orders.append(order)
    done: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * pipeline
    while any(orders):
        for rank, order in enumerate(orders):
            if not order:
                continue
            kind, index = order[0]
            before = rank - 1 if kind == "F" else rank + 1
            needs = (kind, index, before) if 0 <= before < pipeline else ("F", index, rank)
            if kind == "F" and rank == 0:
                ready = 0.0
            elif needs in done:
                ready = done[needs]
            else:
                continue
            clock[rank] = max(clock[rank], ready) + (forward if kind == "F" else backward)
            done[kind, index, rank] = clock[rank]
            order.pop(0)
    return max(clock)


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 3), (3, 7), (5, 11)])
def test_1f1b_as_simulated(pipeline: int, micro_batches: int):
    times = StageTimes(forward=1.0, backward=2.5, weights=1.0, overlapped=3.5)
    step = simulated_1f1b(pipeline, micro_batches, 1.0, 2.5)
    assert bubble_seconds(ParallelLayout(pipeline=pipeline), times) == pytest.approx(
        step - micro_batches * 3.5
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (("1f1b", 15.0 * (10 + 21))),
        ("interleaved", 15 * (10 + 21) / 2),
        ("zb1p", 15.0 * (10 + 21 - 2 * 9)),
        ("dualpipe", (16 / 2 - 1) * (29 + 21 - 3 * 9)),
        # 16 devices are half of the 32 of a DualPipe whose stages are half as long.
        ("dualpipev", (32 / 2 - 1) * (29 + 21 - 3 * 9) / 2),
    ],
)
def test_formulas(schedule: str, expected: float):
    layout = ParallelLayout(pipeline=16, schedule=schedule)  # pyright: ignore[reportArgumentType]
    times = StageTimes(forward=10.0, backward=21.0, weights=9.0, overlapped=29.0)
    assert bubble_seconds(layout, times) == pytest.approx(expected)


def test_without_a_pipeline_nothing_waits():
    times = StageTimes(forward=1.0, backward=2.0, weights=1.0, overlapped=3.0)
    assert bubble_seconds(ParallelLayout(), times) == 0
    assert in_flight(ParallelLayout(), 5, 0) == 1


def test_micro_batches_in_flight():
    """The paper's table: PP for 1F1B, PP + 1 for DualPipe over the two stages of a device."""
    assert [in_flight(ParallelLayout(pipeline=4), 99, rank) for rank in range(4)] == [4, 3, 2, 1]
    assert in_flight(ParallelLayout(pipeline=4), 2, 0) == 2
    dual = ParallelLayout(pipeline=4, schedule="dualpipe")
    assert all(in_flight(dual, 99, r) + in_flight(dual, 99, 3 - r) == 5 for r in range(4))
    interleaved = ParallelLayout(pipeline=4, schedule="interleaved", stages_per_device=2)
    # Megatron's warm-up of 2 (P - 1) + P passes of half stages, and one more in progress.
    assert in_flight(interleaved, 99, 0) == (2 * 3 + 4 + 1) / 2
