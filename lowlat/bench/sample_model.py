"""Sample of a model for `lowlat plan serve --machine here`: a few layers of its shapes, and a model
of negligible size, with random weights.
"""

from dataclasses import replace

import torch
from torch import nn

from lowlat.bench.lowlat_worker import Lowlat
from lowlat.config.model import MLAConfig, ModelConfig, RopeConfig
from lowlat.config.weight_memory import PACKED_DTYPES
from lowlat.engine.parallel_runner import GroupExchange
from lowlat.engine.runner import ModelRunner
from lowlat.model.linear import LayerNorm, RMSNorm
from lowlat.model.quant import store_packed
from lowlat.model.share import ModelShare
from lowlat.model.transformer import Transformer
from lowlat.plan.serving.weights import dtype_weights
from lowlat.utils.device import parse_cache

SAMPLE_BYTES = 3 * 2**28
"""Weights of the sample: more than caches hold, and read in well under a second."""
MOST_LAYERS = 8
LONG = 8192
"""Most tokens in the KV cache of a measured step."""
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
    """`config` with its first `number` layers, without indexers, and the same share of its
    vocabulary: long rows of the head are read faster."""
    number = min(number, config.num_hidden_layers)
    attention = config.attention
    if isinstance(attention, tuple):
        attention = tuple(replace(layer, indexer=None) for layer in attention[:number])
    elif isinstance(attention, MLAConfig):
        attention = replace(attention, indexer=None)
    windows = config.sliding_window_layers
    return replace(
        config,
        vocab_size=-(-config.vocab_size * number // config.num_hidden_layers),
        num_hidden_layers=number,
        attention=attention,
        rope=config.rope[:number] if isinstance(config.rope, tuple) else config.rope,
        sliding_window_layers=windows and tuple(layer for layer in windows if layer < number),
    )


def _bytes(config: ModelConfig, dtype: str) -> int | float:
    return dtype_weights(config, dtype).total(config)


def new_worker(
    config: ModelConfig,
    dtype: str,
    cache: str,
    share: ModelShare | None = None,
    exchange: GroupExchange | None = None,
) -> Lowlat:
    """A benchmark worker in this process with a model of random weights, or its share of one."""
    plain = torch.float32 if dtype == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = Transformer(config, dtype=plain)
        if dtype in PACKED_DTYPES:
            model.add_head()
            store_packed(model, "int8" if dtype == "int8" else "int4")
        if share is not None and exchange is not None:
            model.keep_share(share)
            model.use_exchange(exchange)
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
