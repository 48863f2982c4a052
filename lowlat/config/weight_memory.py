"""Bytes of weights in any dtype, from a model's configuration alone: memory and traffic per token.

Counts are exactly those of the loaded modules, MTP modules included.
"""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from lowlat.config.kv_cache_size import kv_cache_size, mtp_cache_bytes
from lowlat.config.model import (
    AttentionConfig,
    GLAConfig,
    GQAConfig,
    GTAConfig,
    MLAConfig,
    ModelConfig,
    QuantConfig,
    TPAConfig,
)
from lowlat.config.parameter_count import ELEMENT_BYTES, FP32_BYTES, count_parameters

PACKED_DTYPES = ("int8", "int4")
"""Dtypes of quantize on load (`ops.quantized`): of projections; other weights are bf16."""


class _Matrices(NamedTuple):
    """`number` matrices [rows, columns]; `is_rows` is true of kv_b_proj."""

    number: int
    rows: int
    columns: int
    is_rows: bool = False


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
    count, moe = count_parameters(config), config.moe
    parameters = count.total + count.mtp + (count.mtp_copies if config.mtp_copies else 0)
    sparse = sum(config.is_moe_layer(layer) for layer in range(config.num_cache_layers))
    biases = sparse * moe.n_routed_experts if moe and moe.topk_method == "noaux_tc" else 0
    size = ELEMENT_BYTES["bf16" if dtype is None or dtype in PACKED_DTYPES else dtype]
    total = (parameters - biases) * size + biases * max(size, FP32_BYTES)
    if dtype is None and config.quantization is not None:
        total -= _block_savings(config, config.quantization)
    if dtype in PACKED_DTYPES:
        total -= _packing_savings(config, dtype)
    return total


def read_bytes(config: ModelConfig, dtype: str, experts: int) -> int:
    """Bytes of the main model's weights that a step reads: all but MTP modules, the input embedding
    (a tied one is the head) and routed experts beyond `experts` per layer.

    dtype: as `weight_bytes`, or fp8: blocks of the config, else of DeepSeek-V3's size.
    """
    count, moe = count_parameters(config), config.moe
    layers = config.num_hidden_layers
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers))
    routed = 0 if moe is None else count.routed_experts // moe.n_routed_experts * experts
    parameters = count.total - count.routed_experts + routed
    parameters -= count.embedding if count.head else 0
    biases = sparse * moe.n_routed_experts if moe and moe.topk_method == "noaux_tc" else 0
    size = ELEMENT_BYTES.get(dtype, ELEMENT_BYTES["bf16"])
    total = (parameters - biases) * size + biases * max(size, FP32_BYTES)
    if dtype in ELEMENT_BYTES:
        return total
    quant = config.quantization or QuantConfig()
    matrices = list(_projections(config, layers, experts))
    if dtype in PACKED_DTYPES:
        head = _Matrices(1, config.vocab_size, config.hidden_size)
        total -= 2 * head.rows * head.columns - _packed_bytes(head, "int8")
        return total - sum(
            m.number * (2 * m.rows * m.columns - _packed_bytes(m, dtype)) for m in matrices
        )
    return total - sum(m.number * _saved_by_blocks(m, quant) for m in matrices)


def memory_at(
    config: ModelConfig, context: int, dtype: str | None = None, cache: str = "bf16"
) -> dict[str, int]:
    """weights_bytes as `dtype`, cache_bytes of one sequence as `cache`, context; MTP modules
    included.
    """
    row_bytes = kv_cache_size(config).own_bytes_per_token(cache) + mtp_cache_bytes(config, cache)
    return {
        "weights_bytes": weight_bytes(config, dtype),
        "cache_bytes": row_bytes * context,
        "context": context,
    }


def _block_savings(config: ModelConfig, quant: QuantConfig) -> int:
    """Bytes saved by fp8 blocks against bf16, MTP modules included."""
    return sum(m.number * _saved_by_blocks(m, quant) for m in _projections(config))


def _saved_by_blocks(matrix: _Matrices, quant: QuantConfig) -> int:
    """Bytes of one matrix in bf16 less those in fp8 blocks."""
    height, width = quant.weight_block_size
    scales = -(-matrix.rows // height) * -(-matrix.columns // width)
    return matrix.rows * matrix.columns - FP32_BYTES * scales


def _packing_savings(config: ModelConfig, dtype: str) -> int:
    """Bytes saved by int8 or int4 against bf16."""
    hidden, depth = config.hidden_size, config.num_nextn_predict_layers
    saved = sum(
        m.number * (2 * m.rows * m.columns - _packed_bytes(m, dtype)) for m in _projections(config)
    )
    head, joint = _Matrices(1, config.vocab_size, hidden), _Matrices(1, hidden, 2 * hidden)
    heads = 1 + (depth if config.mtp_copies else 0)
    plain_heads = heads - config.tie_word_embeddings
    saved += 2 * plain_heads * head.rows * hidden - heads * _packed_bytes(head, "int8")
    return saved + depth * (2 * joint.rows * joint.columns - _packed_bytes(joint, "int8"))


def _packed_bytes(matrix: _Matrices, dtype: str) -> int:
    """One matrix in tiles of 16 rows and groups of 32 columns; kv_b_proj row by row in int8."""
    if matrix.is_rows:
        return matrix.rows * (matrix.columns + FP32_BYTES)
    blocks = -(-matrix.rows // 16) * -(-matrix.columns // 32)
    return 16 * blocks * {"int8": 32 + 2, "int4": 16 + 2 + 2}[dtype]


def _projections(
    config: ModelConfig, layers: int | None = None, experts: int | None = None
) -> Iterator[_Matrices]:
    """Projections of the first `layers` layers, of all and MTP modules' if None, each layer with
    `experts` routed experts, with all if None.
    """
    layers, moe = config.num_cache_layers if layers is None else layers, config.moe
    sparse = sum(config.is_moe_layer(layer) for layer in range(layers))
    numbers = Counter(config.attention_of(layer) for layer in range(layers))
    for attention, number in numbers.items():
        yield from _attention(attention, config.hidden_size, number)
    yield from _mlp(config, layers - sparse, config.intermediate_size)
    if moe is not None:
        width = moe.moe_intermediate_size
        routed = moe.n_routed_experts if experts is None else experts
        yield from _mlp(config, sparse * routed, width)
        if moe.n_shared_experts:
            yield from _mlp(config, sparse, width * moe.n_shared_experts)


def _mlp(config: ModelConfig, count: int, width: int) -> list[_Matrices]:
    hidden = config.hidden_size
    return [_Matrices(2 * count, width, hidden), _Matrices(count, hidden, width)]


def _attention(attention: AttentionConfig, hidden: int, layers: int) -> list[_Matrices]:
    match attention:
        case GQAConfig():
            keys = attention.num_key_value_heads * attention.head_dim
            outputs = [attention.num_attention_heads * attention.head_dim, keys, keys]
        case GTAConfig():
            outputs = [attention.num_attention_heads * attention.head_dim, attention.entry_dim]
        case TPAConfig():
            heads, width, rank = attention.num_attention_heads, attention.head_dim, attention.q_rank
            outputs = [heads * width] if rank is None else [rank * heads, rank * width]
            for rank in (attention.k_rank, attention.v_rank):
                outputs += [rank * heads, rank * width]
        case MLAConfig():
            return _latent_attention(attention, attention.kv_lora_rank, hidden, layers)
        case GLAConfig():
            return _latent_attention(attention, attention.group_rank, hidden, layers)
    values = attention.num_attention_heads * attention.v_head_dim
    matrices = [_Matrices(layers, rows, hidden) for rows in outputs]
    return [*matrices, _Matrices(layers, hidden, values)]


def _latent_attention(
    attention: MLAConfig | GLAConfig, latent: int, hidden: int, layers: int
) -> list[_Matrices]:
    """`latent`: columns of kv_b_proj."""
    heads, rank = attention.num_attention_heads, attention.q_lora_rank
    queries, values = heads * attention.qk_head_dim, heads * attention.v_head_dim
    shapes = [(queries, hidden)] if rank is None else [(rank, hidden), (queries, rank)]
    shapes += [(attention.entry_dim, hidden), (hidden, values)]
    up = _Matrices(layers, heads * attention.qk_nope_head_dim + values, latent, is_rows=True)
    return [*(_Matrices(layers, *shape) for shape in shapes), up]
