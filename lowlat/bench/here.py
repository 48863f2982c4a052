"""Measure this machine for `lowlat plan serve --machine here`: bandwidth and FLOP/s of the kernels
on a few layers of the model's shapes.

The sample has the model's own shapes and random weights. Four steps are timed, and the step model
(`plan.serving.step_cost`) is solved for the rates: a decode step with few cached tokens gives the
bandwidth of weights, one with many the rate of attention, and two chunks of prefill the rates of
products and of attention. A model of negligible size gives the constant time per layer.

With several NUMA nodes, or under torchrun, every process measures its node while all others do, as
they share memory and caches; `links` measures messages between them.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from lowlat.bench.links import mean_of, measure_links
from lowlat.bench.lowlat_worker import Lowlat
from lowlat.bench.sample_model import LONG, narrow_config, new_worker, sample_config
from lowlat.config.model import ModelConfig
from lowlat.engine.parallel_runner import GroupExchange
from lowlat.engine.prefill_planner import PREFILL_CHUNK
from lowlat.model.share import ModelShare
from lowlat.peers.protocol import random_token_ids
from lowlat.plan.serving.machines import HERE, ServingMachine
from lowlat.plan.serving.step_cost import Step, StepCost, step_cost
from lowlat.plan.serving.weights import WeightBytes, dtype_weights
from lowlat.utils.errors import UserError
from lowlat.utils.memory import RESERVE, memory_limit
from lowlat.utils.process_group import ProcessGroup, local_processes
from lowlat.utils.progress import Progress

SHORT = 64
"""Cached tokens of the short decode step; of the long one LONG."""
LEAST_CHUNK = 512
"""Tokens of the smallest chunk of prefill that is measured; the largest is PREFILL_CHUNK."""
SECONDS = 1.5
"""Time spent on repeating a step."""
LEAST_TRIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTimes:
    """Seconds of the steps of a sample."""

    chunk: int = PREFILL_CHUNK
    """Tokens of a chunk of prefill."""
    decode: float
    long_decode: float
    prefill: float
    later_prefill: float
    """A chunk that ends after LONG tokens."""
    layer: float
    """Per layer of a model of negligible size."""


def measure_here(
    config: ModelConfig,
    dtype: str,
    cache: str,
    prompt: int,
    progress: Progress,
    group: ProcessGroup | None = None,
) -> ServingMachine:
    """This machine with the rates of kernels for `config` in `dtype` (fp32, bf16, int8 or int4), a
    KV cache of type `cache` and prompts of `prompt` tokens. group: the processes that measure, one
    per device, which all call it; None: this one. Takes 10 to 30 seconds. Raises UserError on a
    machine too busy to measure.
    """
    chunk, sample = chunk_of(prompt), sample_config(config, dtype)
    times = _measured(config, dtype, cache, chunk, progress, group)
    weights = dtype_weights(sample, dtype)
    if group is None:
        return solve(sample, weights, cache, times)
    seconds = {name: each for name, each in asdict(times).items() if name != "chunk"}
    mean = {name: mean_of(each, group) for name, each in seconds.items()}
    machine = solve(sample, weights, cache, SampleTimes(**mean, chunk=chunk))
    links = measure_links(narrow_config(config), group, _divided_step)
    if links.latency <= 0:
        raise _too_busy("messages between processes")
    return replace(
        machine,
        devices=group.world_size,
        devices_per_node=local_processes(),
        node_latency=links.latency,
        network_latency=links.latency,
        node_bandwidth=links.bandwidth,
        network_bandwidth=links.bandwidth,
        link_share=1.0,
    )


def chunk_of(prompt: int) -> int:
    """Tokens of the chunk that is measured for prompts of this many: the rate of products grows
    with the tokens per expert."""
    return min(PREFILL_CHUNK, max(LEAST_CHUNK, prompt))


def _measured(
    config: ModelConfig,
    dtype: str,
    cache: str,
    chunk: int,
    progress: Progress,
    group: ProcessGroup | None,
) -> SampleTimes:
    """Times of this process, and of a step while all processes run it: of several runs the best
    one alone, the median next to others, which take their part of the memory's bandwidth."""
    typical = min if group is None else statistics.median

    def decode(worker: Lowlat, context: int) -> float:
        if group is not None:
            group.barrier()
        return _decode_seconds(worker, context, typical)

    def prefill(worker: Lowlat, start: int) -> float:
        if group is not None:
            group.barrier()
        return _prefill_seconds(worker, chunk, start, typical)

    sample = sample_config(config, dtype)
    with progress.task("measuring this machine", 5) as task:
        worker = new_worker(sample, dtype, cache)
        task.advance()
        short, long = (decode(worker, context) for context in (SHORT, LONG))
        task.advance(2)
        first, later = (prefill(worker, start) for start in (0, LONG - chunk))
        task.advance()
        narrow = narrow_config(config)
        layer = decode(new_worker(narrow, dtype, cache), SHORT) / narrow.num_hidden_layers
        task.advance()
    return SampleTimes(
        chunk=chunk,
        decode=short,
        long_decode=long,
        prefill=first,
        later_prefill=later,
        layer=layer,
    )


def _divided_step(
    config: ModelConfig, share: ModelShare | None, exchange: GroupExchange | None
) -> Callable[[], object]:
    """See `links.NewStep`."""
    worker = new_worker(config, "bf16", "bf16", share, exchange)
    worker.fill_cache(SHORT)
    return lambda: worker.decode_step(1, SHORT)


def solve(
    sample: ModelConfig, weights: WeightBytes, cache: str, times: SampleTimes
) -> ServingMachine:
    """The machine on which the step model takes `times` for the steps of `sample`. Raises UserError
    for times that no rates explain.
    """

    def cost(**step: int) -> StepCost:
        return step_cost(sample, Step(**step), weights, cache=cache)

    overhead = times.layer * sample.num_hidden_layers
    short, long = cost(context=SHORT), cost(context=LONG)
    first, later = (cost(queries=times.chunk, context=start) for start in (0, LONG - times.chunk))
    decode_scores = _rate(
        long.attention_flops - short.attention_flops,
        times.long_decode - times.decode,
        "attention of a decode step",
    )
    scores = _rate(
        later.attention_flops - first.attention_flops,
        times.later_prefill - times.prefill,
        "attention of prefill",
    )
    bandwidth = _rate(
        short.weight_bytes,
        times.decode - overhead - short.attention_flops / decode_scores,
        "memory bandwidth",
    )
    products = _rate(
        first.weight_flops,
        times.prefill - overhead - first.attention_flops / scores,
        "products with weights",
    )
    return ServingMachine(
        name=HERE,
        memory_bytes=memory_limit(),
        reserve_bytes=RESERVE,
        devices_per_node=1,
        flops={"fp32": products, "bf16": products},
        memory_bandwidth=bandwidth,
        node_bandwidth=10e9,
        network_bandwidth=1.25e9,
        node_latency=10e-6,
        network_latency=50e-6,
        layer_seconds=times.layer,
        product_share=1.0,
        attention_share=scores / products,
        decode_attention_share=decode_scores / products,
        memory_share=1.0,
    )


def _rate(work: int | float, seconds: float, what: str) -> float:
    """Work per second. Raises UserError where a difference of times is not positive, as other
    programs, or the constant time of a small model, took the rest."""
    if seconds <= 0:
        raise _too_busy(what)
    return work / seconds


def _too_busy(what: str) -> UserError:
    return UserError(
        f"--machine {HERE}: the machine is too busy, or the model too small, to measure {what}; "
        "stop other programs and try again, or name a machine"
    )


Typical = Callable[[Sequence[float]], float]


def _decode_seconds(worker: Lowlat, context: int, typical: Typical = min) -> float:
    worker.fill_cache(context)
    tokens = itertools.cycle(random_token_ids(4096, worker.vocab_size))
    return _seconds(lambda: worker.decode_step(next(tokens), context), typical)


def _prefill_seconds(worker: Lowlat, chunk: int, start: int, typical: Typical) -> float:
    ids = random_token_ids(chunk, worker.vocab_size)
    return _seconds(lambda: worker.prefill_after(ids, start), typical)


def _seconds(run: Callable[[], object], typical: Typical) -> float:
    """Typical time of `run`, repeated for SECONDS after a first time to warm up. Other programs
    only add to the least time."""
    run()
    began, times = time.perf_counter(), []
    while len(times) < LEAST_TRIES or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return typical(times)
