"""KV cache size per token, from a model's configuration alone, next to MHA, GQA and MQA.

Follows DeepSeek-V2 section 2.1.4. Owns no pages: the cache itself is `attention.cache`'s.
"""

from dataclasses import dataclass
from typing import NamedTuple

from lowlat.config.attention import index_key_dim
from lowlat.config.model import AttentionConfig, ModelConfig
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

    @staticmethod
    def of(attention: AttentionConfig) -> "EntrySize":
        """The entry of a layer."""
        return EntrySize(attention.entry_dim, attention.quantized_dim, index_key_dim(attention))

    def num_bytes(self, dtype: str) -> int:
        """Bytes in a cache of `dtype`, the index key included."""
        elements = self.elements - self.index_key
        if dtype == "int8":
            size = int8_entry_bytes(elements, self.quantized - self.index_key)
        else:
            size = elements * ELEMENT_BYTES[dtype]
        return size + index_key_bytes(self.index_key, dtype)


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
        return sum(entry.num_bytes(dtype) for entry in self.entries)


def packs_index_keys(dtype: str) -> bool:
    """Whether index keys (DSA) are int8 in a cache of `dtype`."""
    return dtype not in ("fp32", "fp64")


def index_key_bytes(elements: int, dtype: str) -> int:
    """Bytes of an index key (DSA) in a cache of `dtype`: int8 in whole 4 bytes with an fp32 scale,
    if packed. 0 without an index key.
    """
    if elements == 0:
        return 0
    if not packs_index_keys(dtype):
        return elements * ELEMENT_BYTES[dtype]
    return -(-elements // 4) * 4 + FP32_BYTES


def int8_entry_bytes(elements: int, quantized: int) -> int:
    """Bytes of a KV cache entry with `quantized` int8 elements (in whole 4 bytes), their scales,
    and the other elements in bf16.
    """
    padded, scales = -(-quantized // 4) * 4, -(-quantized // SCALE_CHANNELS)
    return padded + FP32_BYTES * scales + ELEMENT_BYTES["bf16"] * (elements - quantized)


def mtp_cache_bytes(config: ModelConfig, dtype: str) -> int:
    """Bytes per token that MTP modules add to a cache of `dtype`."""
    mtp_layers = range(config.num_hidden_layers, config.num_cache_layers)
    return sum(EntrySize.of(config.attention_of(layer)).num_bytes(dtype) for layer in mtp_layers)


def kv_cache_size(config: ModelConfig) -> KVCacheSize:
    """Cached elements per token and layer of `config` and of the alternatives."""
    layers = [config.attention_of(layer) for layer in range(config.num_hidden_layers)]
    heads = config.num_attention_heads
    width = max(layer.v_head_dim for layer in layers)
    return KVCacheSize(
        entries=tuple(map(EntrySize.of, layers)),
        mha=2 * heads * width,
        gqa8=2 * min(8, heads) * width,
        mqa=2 * width,
    )
