"""config.json -> ModelConfig for every supported family.

Reads strictly: a field that may change the computation is understood, or an error names it. Absent
fields take a default only if every released checkpoint of the family means it. The epsilon of the
latent norms is 1e-6 in every implementation and no field of the file.
"""

from typing import Any

from lowlat.config.hf.families import (
    ARCHITECTURES,
    DENSE_MLA_FAMILIES,
    HARMLESS_FIELDS,
    LOWLAT,
    MAX_LAYERS,
    MLA_FAMILIES,
    MTP_FAMILIES,
    MULTIMODAL_FAMILIES,
    ROPE_LAYOUT_FAMILIES,
    SPARSE_FAMILIES,
)
from lowlat.config.hf.indexer import INDEXER_FIELDS, sparse_attention
from lowlat.config.hf.lowlat_model_type import config_from_lowlat
from lowlat.config.hf.moe import moe_from_hf
from lowlat.config.hf.padded_latent import native_attention
from lowlat.config.hf.quantization import storage_from_hf
from lowlat.config.hf.rope import rope_from_hf
from lowlat.config.model import GQAConfig, MLAConfig, ModelAttention, ModelConfig
from lowlat.utils.json_fields import JsonFields


def config_from_hf(raw: object, *, source: str = "config.json") -> ModelConfig:
    """The model that the parsed config.json `raw` describes; `source` names the file in errors.

    Raises UserError naming the field: wrong types and ranges, unknown fields that may change the
    computation, unsupported values of known fields, and missing fields that determine the model.
    """
    fields = _language_fields(JsonFields(raw, source))
    if fields.value("model_type") == LOWLAT:
        return config_from_lowlat(fields)
    model_type = _model_type(fields)
    _reject_unsupported(fields, model_type)
    layers = fields.integer("num_hidden_layers", maximum=MAX_LAYERS)
    mtp_layers = _num_mtp_layers(fields, model_type)
    context = fields.integer("max_position_embeddings")
    is_mla = model_type in MLA_FAMILIES
    has_experts = is_mla and model_type not in DENSE_MLA_FAMILIES
    attention = _mla(fields, model_type) if is_mla else _gqa(fields, model_type)
    layers_attention: ModelAttention = attention
    if isinstance(attention, MLAConfig) and model_type in SPARSE_FAMILIES:
        layers_attention = sparse_attention(fields, attention, model_type, layers)
    rope = rope_from_hf(
        fields,
        model_type=model_type,
        dim=attention.rope_dim,
        context=context,
        interleave=_rope_interleave(fields, model_type),
        rotated=attention.rope_dim / attention.qk_head_dim if model_type == "mistral4" else 1.0,
    )
    window, window_layers = (None, None) if is_mla else _windows(fields, model_type, layers)
    config = ModelConfig(
        model_type=model_type,
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=fields.integer("intermediate_size"),
        num_hidden_layers=layers,
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=context,
        rms_norm_eps=fields.positive("rms_norm_eps"),
        attention=layers_attention,
        rope=rope,
        moe=moe_from_hf(fields, model_type, layers, mtp_layers) if has_experts else None,
        num_nextn_predict_layers=mtp_layers,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        sliding_window=window,
        sliding_window_layers=window_layers,
        initializer_range=fields.number("initializer_range", 0.02),
        bos_token_id=fields.optional_integer("bos_token_id", minimum=0),
        eos_token_ids=_eos_token_ids(fields),
        **(_scales(fields) if model_type == "minicpm3" else {}),
        **storage_from_hf(fields),
    )
    fields.ignore(*HARMLESS_FIELDS)
    fields.reject_unread("is unknown and may change the computation; remove it if it does not")
    return config


def _language_fields(fields: JsonFields) -> JsonFields:
    """`fields`, or of a multimodal model those of its language part: all others describe the vision
    tower and what surrounds it.
    """
    if fields.value("model_type") not in MULTIMODAL_FAMILIES:
        return fields
    text = fields.given("text_config", fields.table("text_config"), None)
    tied = "tie_word_embeddings"
    if fields.present(tied) and fields.boolean(tied) != text.boolean(tied, False):
        raise fields.error(tied, "contradicts text_config.tie_word_embeddings; correct one")
    if fields.present("quantization_config"):
        raise fields.error("quantization_config", "must be in text_config; move it there")
    return text


def _model_type(fields: JsonFields) -> str:
    model_type = fields.choice("model_type", (*ARCHITECTURES, *MULTIMODAL_FAMILIES, LOWLAT))
    architectures = fields.strings("architectures")
    allowed = {ARCHITECTURES[model_type]}
    if model_type == "kimi_k2":
        allowed.add("KimiK2ForCausalLM")
    if architectures and not allowed.intersection(architectures):
        raise fields.unsupported(
            "architectures", f"for '{model_type}': {', '.join(sorted(allowed))}"
        )
    return model_type


def _reject_unsupported(fields: JsonFields, model_type: str) -> None:
    """Known fields of other models, with a better message than 'unknown field'."""
    fields.choice("hidden_act", ("silu",), "silu")
    if fields.boolean("mlp_bias", False):
        raise fields.unsupported("mlp_bias", "MLPs have no biases (false)")
    if fields.number("attention_dropout", 0.0) != 0.0:
        raise fields.unsupported("attention_dropout", "set it to 0 (inference never uses it)")
    for name in INDEXER_FIELDS:
        if fields.present(name) and model_type not in SPARSE_FAMILIES:
            raise fields.unsupported(
                name, f"sparse attention is that of {' and '.join(SPARSE_FAMILIES)}"
            )


def _num_mtp_layers(fields: JsonFields, model_type: str) -> int:
    name = fields.spelling("num_nextn_predict_layers", "num_mtp_layers")
    count = fields.integer(name, 0, minimum=0, maximum=MAX_LAYERS)
    if count and model_type not in MTP_FAMILIES:
        raise fields.unsupported(name, f"model_type '{model_type}' has no MTP modules (0)")
    return count


def _rope_interleave(fields: JsonFields, model_type: str) -> bool:
    """Pairs are adjacent channels in DeepSeek's checkpoints and those of its relatives but
    minicpm3, half a head apart in all others.
    """
    usual = model_type in MLA_FAMILIES and model_type != "minicpm3"
    interleave = fields.boolean("rope_interleave", usual)
    if interleave != usual and model_type not in ROPE_LAYOUT_FAMILIES:
        raise fields.unsupported("rope_interleave", f"'{model_type}' has {str(usual).lower()}")
    return interleave


def _mla(fields: JsonFields, model_type: str) -> MLAConfig:
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads)
    if kv_heads != heads:
        raise fields.unsupported(
            "num_key_value_heads", f"latent attention has {heads}, one per head"
        )
    # the rotary width to some programs, the full one to others; nothing is computed from it
    fields.ignore("head_dim")
    standard = MLAConfig(
        num_attention_heads=heads,
        kv_lora_rank=fields.integer("kv_lora_rank"),
        q_lora_rank=fields.nullable_integer("q_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", minimum=0),
        qk_rope_head_dim=_even(fields, "qk_rope_head_dim", fields.integer("qk_rope_head_dim")),
        v_head_dim=_v_head_dim(fields, model_type, heads),
        attention_bias=fields.boolean("attention_bias", False),
    )
    return native_attention(fields, standard, model_type)


def _v_head_dim(fields: JsonFields, model_type: str, heads: int) -> int:
    """v_head_dim, by default hidden_size / num_attention_heads in minicpm3."""
    hidden = fields.integer("hidden_size")
    default = hidden // heads if model_type == "minicpm3" and hidden % heads == 0 else None
    return fields.integer("v_head_dim", default)


def _scales(fields: JsonFields) -> dict[str, Any]:
    """Constant factors of minicpm3. Absent, they would silently be those of one checkpoint."""
    for name in ("scale_emb", "scale_depth", "dim_model_base"):
        if not fields.mentioned(name):
            raise fields.error(name, "is missing; the model is not determined without it")
    depth = fields.optional_number("scale_depth")
    return {
        "scale_emb": fields.positive("scale_emb"),
        "scale_depth": None if depth is None else fields.positive("scale_depth"),
        "dim_model_base": fields.optional_integer("dim_model_base"),
    }


def _gqa(fields: JsonFields, model_type: str) -> GQAConfig:
    heads = fields.integer("num_attention_heads")
    kv_heads = fields.integer("num_key_value_heads", heads if model_type == "llama" else None)
    if heads % kv_heads:
        raise fields.error(
            "num_attention_heads", f"{heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    has_bias_field = model_type in ("llama", "qwen3")
    bias = fields.boolean("attention_bias", False) if has_bias_field else False
    return GQAConfig(
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=_head_dim(fields, model_type, heads),
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        qk_norm=model_type == "qwen3",
    )


def _head_dim(fields: JsonFields, model_type: str, heads: int) -> int:
    """head_dim, 128 by default in qwen3, else hidden_size / num_attention_heads."""
    given = fields.optional_integer("head_dim") or (128 if model_type == "qwen3" else None)
    hidden = fields.integer("hidden_size")
    if given is None and hidden % heads:
        raise fields.error("hidden_size", f"{hidden} is no multiple of num_attention_heads {heads}")
    return _even(fields, "head_dim", given or hidden // heads)


def _even(fields: JsonFields, name: str, dim: int) -> int:
    if dim % 2:
        raise fields.error(name, f"{dim} must be even: channels rotate in pairs")
    return dim


def _windows(
    fields: JsonFields, model_type: str, layers: int
) -> tuple[int | None, tuple[int, ...] | None]:
    """sliding_window and sliding_window_layers of the grouped-query families."""
    if model_type == "llama":
        return None, None
    if model_type == "mistral":
        return fields.nullable_integer("sliding_window"), None
    types = _layer_types(fields, layers)
    window = fields.optional_integer("sliding_window")
    first = fields.optional_integer("max_window_layers", minimum=0)
    if not fields.boolean("use_sliding_window", False) or window is None:
        if "sliding_attention" in types:
            raise fields.error("layer_types", "has sliding layers, but no sliding_window is in use")
        return None, None
    if types:
        sliding = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    else:
        sliding = tuple(range(fields.given("max_window_layers", first, None), layers))
    if not sliding:
        return None, None
    return window, None if len(sliding) == layers else sliding


def _layer_types(fields: JsonFields, layers: int) -> tuple[str, ...]:
    types = fields.strings("layer_types")
    if types and len(types) != layers:
        raise fields.error("layer_types", f"has {len(types)} entries for {layers} layers")
    if not {"full_attention", "sliding_attention"}.issuperset(types):
        raise fields.unsupported("layer_types", "supported: full_attention, sliding_attention")
    return types


def _eos_token_ids(fields: JsonFields) -> tuple[int, ...]:
    if not isinstance(fields.value("eos_token_id"), list):
        single = fields.optional_integer("eos_token_id", minimum=0)
        return () if single is None else (single,)
    ids = fields.items("eos_token_id")
    if any(type(token) is not int or not 0 <= token < 2**31 for token in ids):
        raise fields.wrong("eos_token_id", "one token id or an array of them")
    return tuple(ids)
