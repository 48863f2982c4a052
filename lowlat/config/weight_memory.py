"""Bytes of weights in any dtype, from a model's configuration alone: memory and traffic per token.

Counts are exactly those of the loaded modules, MTP modules included.
"""

from collections import Counter
from collections.abc import Iterator

from lowlat.config.kv_cache_size import kv_cache_size, mtp_cache_bytes
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.config.parameter_count import (
    ELEMENT_BYTES,
    FP32_BYTES,
    Matrices,
    attention_matrices,
    count_parameters,
    num_stored_parameters,
)

PACKED_DTYPES = ("int8", "int4")
"""Dtypes of quantize on load (`ops.quantized`): of projections; other weights are bf16."""


def weight_bytes(config: ModelConfig, dtype: str | None = None) -> int:
    """Bytes of all weights, MTP modules included, as `dtype`; None means as released (fp8 blocks,
    else bf16).

    Selection biases of the router are never stored narrower than fp32. fp8 blocks hold every
    projection of attention, MLPs and experts (modules_to_not_convert is ignored) at one byte
    per weight and one fp32 scale per block; embedding, head, gate, norms and eh_proj are bf16. int8
    and int4 are packed as in `model.quant`, where a tied embedding gets a separate head; weights
    released packed stay packed for bf16.
    """
    if config.packing is not None and dtype in (None, "bf16"):
        dtype = config.packing
    if dtype is None:
        dtype = "bf16" if config.quantization is None else "fp8"
    parameters = num_stored_parameters(config)
    total = _unquantized_bytes(config, config.num_cache_layers, parameters, dtype)
    if dtype in ELEMENT_BYTES:
        return total
    total -= sum(_saved(m, dtype, config.quantization) for m in _projections(config))
    if dtype in PACKED_DTYPES:
        hidden, depth = config.hidden_size, config.num_nextn_predict_layers
        heads = Matrices(1 + (depth if config.mtp_copies else 0), config.vocab_size, hidden)
        total -= _saved(heads, "int8") + _saved(Matrices(depth, hidden, 2 * hidden), "int8")
        total += 2 * heads.rows * hidden * config.tie_word_embeddings
    return total


def read_bytes(config: ModelConfig, dtype: str, experts: int) -> int:
    """Bytes of the main model's weights that a step reads: all but MTP modules, the input embedding
    (a tied one is the head) and routed experts beyond `experts` per layer.

    dtype: as `weight_bytes`, or fp8: blocks of the config, else of DeepSeek-V3's size.
    """
    count, moe = count_parameters(config), config.moe
    layers = config.num_hidden_layers
    routed = 0 if moe is None else count.routed_experts // moe.n_routed_experts * experts
    parameters = count.total - count.routed_experts + routed
    parameters -= count.embedding if count.head else 0
    total = _unquantized_bytes(config, layers, parameters, dtype)
    if dtype in ELEMENT_BYTES:
        return total
    if dtype in PACKED_DTYPES:
        total -= _saved(Matrices(1, config.vocab_size, config.hidden_size), "int8")
    return total - sum(
        _saved(m, dtype, config.quantization) for m in _projections(config, layers, experts)
    )


def head_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes of the output head within `read_bytes`."""
    head = Matrices(1, config.vocab_size, config.hidden_size)
    if dtype in PACKED_DTYPES:
        return _packed_bytes(head, "int8")
    return head.rows * head.columns * ELEMENT_BYTES.get(dtype, ELEMENT_BYTES["bf16"])


def memory_at(
    config: ModelConfig, context: int, dtype: str | None = None, cache: str = "bf16"
) -> dict[str, int]:
    """weights_bytes as `dtype`, cache_bytes of a sequence as `cache`, context; MTP included."""
    row_bytes = kv_cache_size(config).own_bytes_per_token(cache) + mtp_cache_bytes(config, cache)
    return {
        "weights_bytes": weight_bytes(config, dtype),
        "cache_bytes": row_bytes * context,
        "context": context,
    }


def _unquantized_bytes(config: ModelConfig, layers: int, parameters: int, dtype: str) -> int:
    """Bytes of `parameters` as `dtype`, bf16 for quantized ones, with the selection biases of the
    first `layers` layers in fp32 at least.
    """
    moe, sparse = config.moe, sum(config.is_moe_layer(layer) for layer in range(layers))
    biases = sparse * moe.n_routed_experts if moe and moe.has_router_bias else 0
    size = ELEMENT_BYTES.get(dtype, ELEMENT_BYTES["bf16"])
    return (parameters - biases) * size + biases * max(size, FP32_BYTES)


def _saved(matrices: Matrices, dtype: str, quant: QuantConfig | None = None) -> int:
    """Bytes of `matrices` in bf16 less those in int8, int4 or the fp8 blocks of `quant`."""
    number, rows, columns, _ = matrices
    if dtype in PACKED_DTYPES:
        return number * (2 * rows * columns - _packed_bytes(matrices, dtype))
    height, width = (quant or QuantConfig()).weight_block_size
    scales = -(-rows // height) * -(-columns // width)
    return number * (rows * columns - FP32_BYTES * scales)


def _packed_bytes(matrix: Matrices, dtype: str) -> int:
    """One matrix in tiles of 16 rows and groups of 32 columns; kv_b_proj row by row in int8."""
    if matrix.is_rows:
        return matrix.rows * (matrix.columns + FP32_BYTES)
    blocks = -(-matrix.rows // 16) * -(-matrix.columns // 32)
    return 16 * blocks * {"int8": 32 + 2, "int4": 16 + 2 + 2}[dtype]


def _projections(
    config: ModelConfig, layers: int | None = None, experts: int | None = None
) -> Iterator[Matrices]:
    """Projections of the first `layers` layers, of all and MTP modules' if None, each layer with
    `experts` routed experts, with all if None.
    """
    layers, moe = config.num_cache_layers if layers is None else layers, config.moe
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers))
    numbers = Counter(config.attention_of(layer) for layer in range(layers))
    for attention, number in numbers.items():
        yield from attention_matrices(attention, config.hidden_size, number)
    yield from _mlp(config, layers - sparse, config.intermediate_size)
    if moe is not None:
        width = moe.moe_intermediate_size
        routed = moe.n_routed_experts if experts is None else experts
        yield from _mlp(config, sparse * routed, width)
        if moe.n_shared_experts:
            yield from _mlp(config, sparse, width * moe.n_shared_experts)


def _mlp(config: ModelConfig, count: int, width: int) -> list[Matrices]:
    hidden = config.hidden_size
    return [Matrices(2 * count, width, hidden), Matrices(count, hidden, width)]
