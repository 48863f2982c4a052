"""KV cache size per token, from a model's configuration alone, next to MHA, GQA and MQA.

Follows DeepSeek-V2 section 2.1.4. Owns no pages: the cache itself is `attention.cache`'s.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lowlat.config.attention import index_key_dim
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import ELEMENT_BYTES, FP32_BYTES

SCALE_CHANNELS = 64
"""Elements of an int8 KV cache entry that share an fp32 scale."""


class EntrySize(NamedTuple):
    """The KV cache entry of one token in one layer."""

    elements: int
    """All elements."""
    quantized: int
    """Elements that an int8 cache stores in int8; the others stay bf16."""
    index_key: int = 0
    """Elements of the index key of sparse attention (DSA)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheSize:
    """Cached elements per token of a model, and of other attentions with its heads and head width.

    `mha`, `gqa8` and `mqa` cache keys and values of every head, of 8 groups (fewer if there are
    fewer heads) and of one. Head width d_h is the width of a value, v_head_dim or head_dim, in the
    widest layer.
    """

    entries: tuple[EntrySize, ...]
    """The model's own entry in each decoder layer; MTP modules not counted."""
    mha: int
    """MHA: 2 n_h d_h elements per token and layer."""
    gqa8: int
    """GQA with 8 groups: 2 * 8 * d_h."""
    mqa: int
    """MQA: 2 d_h."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.entries)

    @property
    def elements_per_token_layer(self) -> int | float:
        """The model's own elements, averaged where layers differ."""
        total, layers = sum(entry.elements for entry in self.entries), len(self.entries)
        return total / layers if total % layers else total // layers

    @property
    def gqa_groups_equivalent(self) -> float:
        """Groups of a GQA with the same cache: elements / (2 d_h); 2.25 for DeepSeek-V3."""
        return self.elements_per_token_layer / self.mqa

    def bytes_per_token(self, elements: int, dtype: str) -> int:
        """Bytes per token of `elements` per layer, all layers together, stored as `dtype`."""
        if dtype == "int8":
            return self.num_layers * int8_entry_bytes(elements, elements)
        return elements * self.num_layers * ELEMENT_BYTES[dtype]

    def own_bytes_per_token(self, dtype: str) -> int:
        """Bytes per token of the model itself, all layers together, in a cache of `dtype`."""
        if dtype == "int8":
            return sum(int8_entry_bytes(*entry) for entry in self.entries)
        return sum(entry.elements for entry in self.entries) * ELEMENT_BYTES[dtype]


def int8_entry_bytes(elements: int, quantized: int, index: int = 0) -> int:
    """Bytes of a KV cache entry with `quantized` int8 elements (in whole 4 bytes), their scales,
    and the other elements in bf16. The first `index` of them, the index key of sparse attention,
    are stored apart.
    """
    if index:
        rest = int8_entry_bytes(elements - index, quantized - index)
        return int8_entry_bytes(index, index) + rest
    padded, scales = -(-quantized // 4) * 4, -(-quantized // SCALE_CHANNELS)
    return padded + FP32_BYTES * scales + ELEMENT_BYTES["bf16"] * (elements - quantized)


def mtp_cache_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes per token that MTP modules add to a cache of `dtype`."""
    mtp_layers = range(config.num_hidden_layers, config.num_cache_layers)
    entries = [config.attention_of(layer) for layer in mtp_layers]
    if dtype == "int8":
        sizes = [EntrySize(e.entry_dim, e.quantized_dim, index_key_dim(e)) for e in entries]
        return sum(int8_entry_bytes(*size) for size in sizes)
    return sum(entry.entry_dim for entry in entries) * ELEMENT_BYTES[dtype]


def kv_cache_size(config: ModelConfig) -> KVCacheSize:
    """Cached elements per token and layer of `config` and of the alternatives."""
    layers = [config.attention_of(layer) for layer in range(config.num_hidden_layers)]
    heads = config.num_attention_heads
    width = max(layer.v_head_dim for layer in layers)
    return KVCacheSize(
        entries=tuple(
            EntrySize(layer.entry_dim, layer.quantized_dim, index_key_dim(layer))
            for layer in layers
        ),
        mha=2 * heads * width,
        gqa8=2 * min(8, heads) * width,
        mqa=2 * width,
    )
