"""Bytes of a model's weights by how layouts divide them: from its config and a dtype or GGUF type,
or from the tensors of a checkpoint whose weights stay quantized as stored.
"""

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import (
    ELEMENT_BYTES,
    FP32_BYTES,
    count_parameters,
    num_stored_parameters,
)
from lowlat.config.weight_memory import PACKED_DTYPES, head_bytes, read_bytes, weight_bytes

if TYPE_CHECKING:
    from lowlat.checkpoint.tensor_source import StoredTensor, TensorSource

LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBytes:
    """Bytes of weights as loaded."""

    layers: int | float
    """Decoder layers without routed experts: attention, dense MLPs, shared experts, gates, norms.
    """
    head: int | float
    """Output head; the embedding where the two are tied."""
    expert: int | float
    """Mean of one routed expert of every layer, summed over the layers."""
    embedding: int | float = 0
    """Input embedding, of which a step reads a row per token; 0 if it is the head."""
    mtp: int | float = 0
    """MTP modules."""

    def read_bytes(self, experts: int | float) -> int | float:
        """Bytes that a step of the main model reads which uses `experts` routed experts per
        layer."""
        return self.layers + self.head + experts * self.expert

    def total(self, config: ModelConfig) -> int | float:
        """Bytes of all weights."""
        experts = config.moe.n_routed_experts if config.moe else 0
        return self.read_bytes(experts) + self.embedding + self.mtp


def dtype_weights(config: ModelConfig, dtype: str) -> WeightBytes:
    """The weights as `dtype`: fp32, bf16, fp8, int8, int4."""
    shared, head = read_bytes(config, dtype, 0), head_bytes(config, dtype)
    expert = read_bytes(config, dtype, 1) - shared if config.moe else 0
    # a packed tied model has a head of its own
    is_tied = config.tie_word_embeddings and dtype not in PACKED_DTYPES
    size = ELEMENT_BYTES.get(dtype, ELEMENT_BYTES["bf16"])
    embedding = 0 if is_tied else config.vocab_size * config.hidden_size * size
    experts = config.moe.n_routed_experts if config.moe else 0
    main = shared + experts * expert + embedding
    return WeightBytes(
        layers=shared - head,
        head=head,
        expert=expert,
        embedding=embedding,
        mtp=max(0, weight_bytes(config, dtype) - main) if config.num_nextn_predict_layers else 0,
    )


def gguf_weights(config: ModelConfig, bits: int | float) -> WeightBytes:
    """All weights in a GGUF type of `bits` bits per weight. Files mix types: their own size is
    `stored_weights`'.
    """
    count, size = count_parameters(config), bits / 8
    experts = config.moe.n_routed_experts if config.moe else 1
    head = count.head or count.embedding
    rest = count.total - count.routed_experts - count.embedding - count.head
    return WeightBytes(
        layers=rest * size,
        head=head * size,
        expert=count.routed_experts // experts * size,
        embedding=count.embedding * size if count.head else 0.0,
        mtp=(num_stored_parameters(config) - count.total) * size,
    )


def stored_weights(source: "TensorSource", config: ModelConfig) -> WeightBytes | None:
    """The bytes of a checkpoint with quantized matrices; None for one without."""
    if not any(tensor.quantized() for tensor in source.tensors.values()):
        return None
    sizes = {"layers": 0.0, "head": 0.0, "expert": 0.0, "embedding": 0.0, "mtp": 0.0}
    for name, tensor in source.tensors.items():
        sizes[_part(name, config)] += _stored_bytes(tensor)
    if config.tie_word_embeddings:
        sizes["head"] += sizes.pop("embedding")
    if config.moe:
        sizes["expert"] /= config.moe.n_routed_experts
    return WeightBytes(**sizes)


def _part(name: str, config: ModelConfig) -> str:
    """The field of `WeightBytes` that the tensor `name` counts in."""
    layer = LAYER.match(name)
    if layer and int(layer[1]) >= config.num_hidden_layers:
        return "mtp"
    if ".mlp.experts." in name:
        return "expert"
    return {EMBEDDING: "embedding", HEAD: "head"}.get(name, "layers")


def _stored_bytes(tensor: "StoredTensor") -> int:
    # imported late: configs need no torch
    from lowlat.checkpoint.tensor_source import ScaledRows
    from lowlat.ops.gguf_blocks import row_bytes

    storage = tensor.quantized()
    elements = math.prod(tensor.shape)
    if isinstance(storage, ScaledRows):
        return elements + FP32_BYTES * tensor.shape[0]
    if not storage:
        return elements * tensor.dtype.itemsize
    if len(storage) == 1:
        return tensor.shape[0] * row_bytes(storage[0].kind, tensor.shape[1])
    # the parts of a kv_b_proj have shapes of their own
    return sum(part.rows().nbytes for part in storage)
