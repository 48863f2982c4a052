"""Fields of DeepSeek Sparse Attention (DSA) in config.json <-> the indexer of each layer.

In glm_moe_dsa layers may share the tokens that an earlier layer chose (IndexShare, arXiv
2603.12201): indexer_types lists them, else index_topk_pattern, else index_topk_freq and
index_skip_topk_offset, with the defaults of transformers.
"""

from dataclasses import replace
from typing import Any

from lowlat.config.attention import IndexerConfig, MLAConfig, ModelAttention
from lowlat.config.model import ModelConfig
from lowlat.utils.json_fields import JsonFields

INDEXER_FIELDS = ("index_n_heads", "index_head_dim", "index_topk")

FULL, SHARED = "full", "shared"
"""Values of indexer_types: a layer with an indexer, and one that shares a choice."""
PATTERN = {"F": FULL, "S": SHARED}
DEFAULT_OFFSET = 2


def sparse_attention(
    fields: JsonFields, attention: MLAConfig, model_type: str, layers: int
) -> ModelAttention:
    """`attention` with the indexer of each of `layers` layers.

    Raises UserError naming the field: sizes that do not fit, a first layer that shares a choice.
    """
    if attention.q_lora_rank is None:
        raise fields.error("q_lora_rank", f"must be a number: indexers of '{model_type}' read it")
    heads, width, topk = (fields.integer(name) for name in INDEXER_FIELDS)
    if width < attention.qk_rope_head_dim:
        rotary = attention.qk_rope_head_dim
        raise fields.error("index_head_dim", f"{width} is less than qk_rope_head_dim {rotary}")
    is_glm = model_type == "glm_moe_dsa"
    indexer = IndexerConfig(
        index_n_heads=heads,
        index_head_dim=width,
        index_topk=topk,
        rope_interleave=fields.boolean("indexer_rope_interleave", is_glm),
    )
    if not {"indexed_attention"}.issuperset(fields.strings("layer_types")):
        raise fields.unsupported("layer_types", "supported: indexed_attention")
    # whether repeated draft steps of an MTP module reuse its choice: no output depends on it
    fields.ignore("index_share_for_mtp_iteration")
    fields.choice("moe_router_dtype", ("float32",), "float32")
    types = _indexer_types(fields, layers) if is_glm else [FULL] * layers
    indexers = [replace(indexer, is_shared=kind == SHARED) for kind in types]
    return tuple(replace(attention, indexer=own) for own in indexers)


def _indexer_types(fields: JsonFields, layers: int) -> list[str]:
    """full or shared for each layer. Fields that do not decide must not contradict."""
    frequency = fields.integer("index_topk_freq", 1)
    offset = fields.integer("index_skip_topk_offset", DEFAULT_OFFSET, minimum=0)
    rules = {
        "indexer_types": list(fields.strings("indexer_types")),
        "index_topk_pattern": _pattern(fields),
    }
    if fields.present("index_topk_freq") or not any(rules.values()):
        numbers = (max(layer - offset + 1, 0) for layer in range(layers))
        rules["index_topk_freq"] = [SHARED if n % frequency else FULL for n in numbers]
    given = {name: types for name, types in rules.items() if types}
    name, types = next(iter(given.items()))
    if len(types) != layers:
        raise fields.error(name, f"has {len(types)} entries for {layers} layers")
    if not {FULL, SHARED}.issuperset(types):
        raise fields.unsupported(name, f"supported: {FULL}, {SHARED}")
    for other, found in given.items():
        if found != types:
            raise fields.error(other, f"contradicts {name}; keep one")
    if types[0] == SHARED:
        raise fields.error(name, "lets layer 0 share a choice, but no layer before it has made one")
    return types


def _pattern(fields: JsonFields) -> list[str]:
    """index_topk_pattern: a string such as 'FSSF', or a list as in indexer_types."""
    value = fields.value("index_topk_pattern")
    if not isinstance(value, str):
        return list(fields.strings("index_topk_pattern"))
    if not set(PATTERN).issuperset(value):
        raise fields.wrong("index_topk_pattern", "a string of F (full) and S (shared)")
    return [PATTERN[letter] for letter in value]


def indexer_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of config.json that `sparse_attention` reads."""
    layers = [config.attention_of(layer) for layer in range(config.num_hidden_layers)]
    indexers = [layer.indexer for layer in layers if isinstance(layer, MLAConfig)]
    first = indexers[0]
    assert first is not None
    raw: dict[str, Any] = {name: getattr(first, name) for name in INDEXER_FIELDS}
    raw["indexer_rope_interleave"] = first.rope_interleave
    if config.model_type == "glm_moe_dsa":
        shared = [indexer is not None and indexer.is_shared for indexer in indexers]
        raw["indexer_types"] = [SHARED if one else FULL for one in shared]
    return raw
