"""Measure this machine for `lowlat plan serve --machine here`: bandwidth and FLOP/s of the kernels
on a few layers of the model's shapes.

The sample has the model's own shapes and random weights. Four steps are timed, and the step model
(`plan.serving.step_cost`) is solved for the rates: a decode step with few cached tokens gives the
bandwidth of weights, one with many the rate of attention, and two chunks of prefill the rates of
products and of attention. A model of negligible size gives the constant time per layer.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from lowlat.bench.lowlat_worker import Lowlat
from lowlat.config.model import MLAConfig, ModelConfig, RopeConfig
from lowlat.config.weight_memory import PACKED_DTYPES
from lowlat.engine.runner import ModelRunner
from lowlat.model.linear import LayerNorm, RMSNorm
from lowlat.model.quant import store_packed
from lowlat.model.transformer import Transformer
from lowlat.peers.protocol import random_token_ids
from lowlat.plan.serving.machines import HERE, ServingMachine
from lowlat.plan.serving.step_cost import Step, StepCost, step_cost
from lowlat.plan.serving.weights import WeightBytes, dtype_weights
from lowlat.utils.device import parse_cache
from lowlat.utils.errors import UserError
from lowlat.utils.memory import RESERVE, memory_limit
from lowlat.utils.progress import Progress
from lowlat.utils.topology import machine_topology

SAMPLE_BYTES = 3 * 2**28
"""Weights of the sample: more than caches hold, and read in well under a second."""
MOST_LAYERS = 8
VOCABULARY = 4096
SHORT, LONG = 64, 8192
"""Cached tokens of the two decode steps."""
CHUNK = 1024
"""Tokens of a chunk of prefill."""
SECONDS = 1.5
"""Time spent on repeating a step."""
LEAST_TRIES = 3
CONSTANT = 0.02
"""Random weights lie within plus and minus this; so are the scales of quantized ones."""

NARROW = MLAConfig(
    num_attention_heads=2,
    kv_lora_rank=32,
    q_lora_rank=32,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTimes:
    """Seconds of the steps of a sample."""

    decode: float
    long_decode: float
    prefill: float
    later_prefill: float
    """A chunk after LONG - CHUNK cached tokens."""
    layer: float
    """Per layer of a model of negligible size."""


def measure_here(config: ModelConfig, dtype: str, cache: str, progress: Progress) -> ServingMachine:
    """This machine with the rates of kernels for `config` in `dtype` (fp32, bf16, int8 or int4) and
    a KV cache of type `cache`. Takes about ten seconds. Raises UserError on a machine too busy to
    measure.
    """
    sample = sample_config(config, dtype)
    with progress.task("measuring this machine", 5) as task:
        worker = new_worker(sample, dtype, cache)
        task.advance()
        decode, long_decode = (_decode_seconds(worker, context) for context in (SHORT, LONG))
        task.advance(2)
        prefill, later = (_prefill_seconds(worker, start) for start in (0, LONG - CHUNK))
        task.advance()
        narrow = narrow_config(config)
        layer = _decode_seconds(new_worker(narrow, dtype, cache), SHORT) / narrow.num_hidden_layers
        task.advance()
    times = SampleTimes(
        decode=decode, long_decode=long_decode, prefill=prefill, later_prefill=later, layer=layer
    )
    return solve(sample, dtype_weights(sample, dtype), cache, times)


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
    first, later = cost(queries=CHUNK), cost(queries=CHUNK, context=LONG - CHUNK)
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
    # one rank per NUMA node; the measurement ran on all of them
    nodes = len(machine_topology().nodes)
    return ServingMachine(
        name=HERE,
        memory_bytes=memory_limit() // nodes,
        reserve_bytes=RESERVE,
        devices=nodes,
        devices_per_node=nodes,
        flops={"fp32": products / nodes, "bf16": products / nodes},
        memory_bandwidth=bandwidth / nodes,
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
        raise UserError(
            f"--machine {HERE}: the machine is too busy, or the model too small, to measure "
            f"{what}; stop other programs and try again, or name a machine"
        )
    return work / seconds


def sample_config(config: ModelConfig, dtype: str) -> ModelConfig:
    """The first layers of `config`, one of each kind at least, as many as SAMPLE_BYTES hold; with
    fewer experts if one layer of them is larger. Sparse attention (DSA) is measured as dense.
    """
    moe = config.moe
    dense = 0
    if moe is not None:
        dense = next(n for n in range(config.num_hidden_layers) if config.is_moe_layer(n))
        moe = replace(
            moe, first_k_dense_replace=min(1, dense), moe_layer_freq=1, mlp_layer_types=None
        )
    sample = replace(
        config,
        moe=moe,
        vocab_size=min(config.vocab_size, VOCABULARY),
        max_position_embeddings=max(config.max_position_embeddings, 2 * LONG),
        num_nextn_predict_layers=0,
        quantization=None,
        packing=None,
        bos_token_id=None,
        eos_token_ids=(),
    )
    least = min(1, dense) + 1
    if moe is not None and _bytes(_first_layers(sample, least), dtype) > SAMPLE_BYTES:
        # all chosen, so that decode reads and prefill multiplies every expert
        few = moe.num_experts_per_tok
        moe = replace(moe, n_routed_experts=few, n_group=1, topk_group=1)
        sample = replace(sample, moe=moe)
    most = max(least, min(MOST_LAYERS, config.num_hidden_layers))
    fitting = (
        taken
        for number in range(most, least, -1)
        if _bytes(taken := _first_layers(sample, number), dtype) <= SAMPLE_BYTES
    )
    return next(fitting, _first_layers(sample, least))


def narrow_config(config: ModelConfig) -> ModelConfig:
    """MOST_LAYERS small layers, with experts if `config` has them: their weights take no time to
    read.
    """
    moe = config.moe and replace(
        config.moe,
        n_routed_experts=config.moe.num_experts_per_tok,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=0,
        moe_layer_freq=1,
        mlp_layer_types=None,
    )
    return replace(
        sample_config(config, "bf16"),
        hidden_size=64,
        intermediate_size=64,
        vocab_size=64,
        num_hidden_layers=MOST_LAYERS,
        attention=NARROW,
        rope=RopeConfig(rope_theta=1e4),
        sliding_window=None,
        sliding_window_layers=None,
        moe=moe,
    )


def _first_layers(config: ModelConfig, number: int) -> ModelConfig:
    """`config` with its first `number` layers, without indexers."""
    number = min(number, config.num_hidden_layers)
    attention = config.attention
    if isinstance(attention, tuple):
        attention = tuple(replace(layer, indexer=None) for layer in attention[:number])
    elif isinstance(attention, MLAConfig):
        attention = replace(attention, indexer=None)
    windows = config.sliding_window_layers
    return replace(
        config,
        num_hidden_layers=number,
        attention=attention,
        rope=config.rope[:number] if isinstance(config.rope, tuple) else config.rope,
        sliding_window_layers=windows and tuple(layer for layer in windows if layer < number),
    )


def _bytes(config: ModelConfig, dtype: str) -> int | float:
    return dtype_weights(config, dtype).total(config)


def new_worker(config: ModelConfig, dtype: str, cache: str) -> Lowlat:
    """A benchmark worker in this process with a model of random weights."""
    plain = torch.float32 if dtype == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = Transformer(config, dtype=plain)
        if dtype in PACKED_DTYPES:
            model.add_head()
            store_packed(model, "int8" if dtype == "int8" else "int4")
    model = model.to_empty(device="cpu")
    model.set_context(config.max_position_embeddings)
    fill(model)
    worker = Lowlat()
    worker.use(ModelRunner(model, cache_dtype=parse_cache("int8") if cache == "int8" else None))
    return worker


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, by repeating a block: drawing each would take longer than the measurement."""
    generator = torch.Generator().manual_seed(0)
    block = torch.randint(-128, 128, (1 << 20,), dtype=torch.int8, generator=generator)
    for module in model.modules():
        is_norm = isinstance(module, RMSNorm | LayerNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if name in ("weight_scale", "weight_minimum") or parameter.dtype == torch.float16:
                parameter.fill_(CONSTANT / 128)
            elif is_norm and name == "weight":
                parameter.fill_(1.0)
            else:
                flat = parameter.data.view(-1)
                for start in range(0, len(flat), len(block)):
                    part = flat[start : start + len(block)]
                    values = block[: len(part)]
                    if part.dtype.is_floating_point:
                        part.copy_(values).mul_(CONSTANT / 128)
                    else:
                        part.copy_(values.view(part.dtype))


def _decode_seconds(worker: Lowlat, context: int) -> float:
    worker.fill_cache(context)
    tokens = itertools.cycle(random_token_ids(4096, worker.vocab_size))
    return _best_seconds(lambda: worker.decode_step(next(tokens), context))


def _prefill_seconds(worker: Lowlat, start: int) -> float:
    ids = random_token_ids(CHUNK, worker.vocab_size)
    return _best_seconds(lambda: worker.prefill_after(ids, start))


def _best_seconds(run: Callable[[], object]) -> float:
    """Least time of `run`, repeated for SECONDS after a first time to warm up: other programs only
    add to it."""
    run()
    began, times = time.perf_counter(), []
    while len(times) < LEAST_TRIES or time.perf_counter() - began < SECONDS:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
