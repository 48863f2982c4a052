"""Latency and bandwidth of messages between the processes of a run, measured for `lowlat plan
serve --machine here`.

The latency is that of the exchanges of a divided step: a small model is timed whole and divided by
tensor parallelism. It contains what an exchange costs besides the transport: barriers of threads,
the call from the kernels, and the wait for the slower process.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.config.serving_layout import ServingLayout
from lowlat.engine.parallel_runner import GroupExchange
from lowlat.model.share import ModelShare
from lowlat.plan.serving.traffic import rank_traffic
from lowlat.utils.process_group import ProcessGroup

STEPS = 100
LARGE_BYTES = 4 << 20
LARGE_MESSAGES = 9

NewStep = Callable[[ModelConfig, ModelShare | None, GroupExchange | None], Callable[[], object]]
"""A decode step of a model of random weights: its config, this process's share, its exchange."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Links:
    """Messages between processes; equal in all of them."""

    latency: float
    """Seconds of a message of a divided step."""
    bandwidth: float
    """Bytes/s that a process sends in an all-gather."""


def measure_links(narrow: ModelConfig, group: ProcessGroup, new_step: NewStep) -> Links:
    """The links between the processes of `group`, which all call it. narrow: a model of negligible
    size."""
    size = group.world_size
    assert isinstance(narrow.attention, MLAConfig)
    config = replace(
        narrow,
        moe=None,
        hidden_size=64 * size,
        intermediate_size=64 * size,
        vocab_size=64 * size,
        attention=replace(narrow.attention, num_attention_heads=2 * size),
    )
    share = replace(ModelShare.whole(config), tensor=size, tensor_rank=group.rank)
    exchange = GroupExchange(group, share)
    whole, divided = new_step(config, None, None), new_step(config, share, exchange)
    _, messages = rank_traffic(config, ServingLayout(tensor=size), size - 1, tokens=1)
    added = _seconds(divided, STEPS, group) - _seconds(whole, STEPS, group)
    own = torch.zeros(LARGE_BYTES, dtype=torch.uint8)
    out = torch.zeros(size * LARGE_BYTES, dtype=torch.uint8)
    large = _seconds(lambda: exchange.gather(0, own, out), LARGE_MESSAGES, group)
    sent = LARGE_BYTES * (size - 1)
    return Links(latency=mean_of(added, group) / messages, bandwidth=sent / mean_of(large, group))


def mean_of(value: float, group: ProcessGroup) -> float:
    """The mean of the processes' values, in all of them."""
    return statistics.mean(map(float, group.gather_texts(repr(value))))


def _seconds(run: Callable[[], object], times: int, group: ProcessGroup) -> float:
    """Median time of `run`, in all processes at once."""
    run()
    group.barrier()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
