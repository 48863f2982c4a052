"""Small records with sensible figures, any of which a test may choose."""

import dataclasses
import math
from typing import Any

from lowlat.train.metrics.record import (
    EvalRecord,
    ExpertRecord,
    PassAtKRecord,
    RolloutRecord,
    StartRecord,
    StepRecord,
)


def layer(
    number: int, counts: list[int], *, bias: tuple[float, float] = (0.0, 0.0)
) -> ExpertRecord:
    """MoE layer `number`, whose experts got `counts` choices."""
    load = tuple(count / sum(counts) for count in counts)
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    return ExpertRecord(
        layer=number,
        load=load,
        max_violation=max(load) * len(load) - 1.0,
        entropy=entropy / math.log(len(load)),
        bias_min=bias[0],
        bias_max=bias[1],
    )


def experts(layers: int = 3, count: int = 7) -> tuple[ExpertRecord, ...]:
    """Layers from 1, each less even than the one before."""
    return tuple(
        layer(
            number,
            [10 + number * expert for expert in range(count)],
            bias=(-0.01 * number, 0.02 * number),
        )
        for number in range(1, layers + 1)
    )


def step(number: int, **changes: Any) -> StepRecord:
    """Step `number` of a run of 100 tokens per step and 10 seconds per step."""
    record = StepRecord(
        step=number,
        phase="main",
        tokens=100 * number,
        seconds=10.0 * number,
        loss=2.0 + 5.0 / number,
        mtp_losses=(3.0 + 5.0 / number,),
        z_loss=0.0,
        sequence_loss=0.001,
        grad_norm=1.5,
        learning_rate=3e-4,
        batch_tokens=100,
        tokens_per_second=12.5,
        mfu=0.43,
        memory_bytes=1_234_000_000,
        experts=experts(),
    )
    return dataclasses.replace(record, **changes)


def evaluation(number: int, **changes: Any) -> EvalRecord:
    """An evaluation after step `number`."""
    record = EvalRecord(
        step=number,
        tokens=100 * number,
        split="held_out",
        loss=2.5 + 5.0 / number,
        bits_per_byte=1.25,
        mtp_losses=(3.5,),
    )
    return dataclasses.replace(record, **changes)


def held_out(number: int, pass_at_1: float) -> EvalRecord:
    """An evaluation on held-out prompts after step `number` of a GRPO phase."""
    record = PassAtKRecord(
        num_prompts=1,
        num_generations=8,
        pass_at={"1": pass_at_1, "8": 0.75},
        stderr={"1": math.inf, "8": 0.5},
        score=0.125,
        length=7.5,
        truncated=0.25,
        failed=3,
    )
    return evaluation(
        number,
        split="held_out_prompts",
        loss=None,
        bits_per_byte=None,
        mtp_losses=(),
        pass_at_k=record,
    )


def grpo_step(number: int, **changes: Any) -> StepRecord:
    """Step `number` of a GRPO phase; `changes` are fields of the rollouts."""
    rollouts = RolloutRecord(
        loss=0.01,
        reward=0.01 * number,
        reward_std=0.25,
        length=100.0 - number,
        truncated=0.125,
        no_signal=0.5,
        failed=1,
        entropy=1.5,
        clipped=0.0625,
        rollout_tokens_per_second=1000.0,
        update_tokens_per_second=100.0,
        kl=0.03125,
        mismatch=0.0,
    )
    rollouts = dataclasses.replace(rollouts, **changes)
    return step(number, loss=None, mtp_losses=(), mfu=None, rollouts=rollouts)


def start(number: int = 0, **changes: Any) -> StartRecord:
    """A run that begins after step `number`, of 13 steps."""
    record = StartRecord(
        step=number,
        name="tiny",
        total_steps=13,
        tokens_total=1300,
        facts={"parameters": 12_345, "device": "cpu"},
        time="2024-02-29T12:00:00+00:00",
    )
    return dataclasses.replace(record, **changes)
