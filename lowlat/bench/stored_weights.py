"""Bytes per step of weights that stay quantized as stored: GGUF blocks, low-bit safetensors."""

import math
import re
from dataclasses import dataclass

from lowlat.checkpoint.tensor_source import ScaledRows, StoredTensor, TensorSource
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import FP32_BYTES
from lowlat.ops.gguf_blocks import row_bytes

LAYER = re.compile(r"model\.layers\.([0-9]+)\.")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredWeights:
    """Bytes of the main model's weights in the file's types, without MTP modules and the input
    embedding (a tied one is the head).
    """

    shared: int
    """Bytes that every token reads."""
    expert: float
    """Mean bytes of one routed expert of every layer."""

    def read_bytes(self, experts: int) -> float:
        """Bytes that a step reads which uses `experts` routed experts per layer."""
        return self.shared + experts * self.expert


def stored_weights(source: TensorSource, config: ModelConfig) -> StoredWeights | None:
    """The bytes of a checkpoint with quantized matrices; None for one without."""
    if not any(tensor.quantized() for tensor in source.tensors.values()):
        return None
    shared = routed = 0
    for name, tensor in source.tensors.items():
        layer = LAYER.match(name)
        if layer and int(layer[1]) >= config.num_hidden_layers:
            continue
        if ".mlp.experts." in name:
            routed += _stored_bytes(tensor)
        elif name != EMBEDDING or config.tie_word_embeddings:
            shared += _stored_bytes(tensor)
    return StoredWeights(
        shared=shared, expert=routed / config.moe.n_routed_experts if config.moe else 0.0
    )


def _stored_bytes(tensor: StoredTensor) -> int:
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
