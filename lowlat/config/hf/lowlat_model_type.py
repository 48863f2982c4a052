"""config.json of model_type "lowlat": models that no Hugging Face family can express.

Per-layer MLA sizes, gated MLA, GLA, MLRA, GTA and TPA, partial biases.

The file holds ModelConfig's fields under their own names, nested like the dataclasses:

    "attention":    {"form": "mla", "gqa", "gla", "gta" or "tpa", and that form's fields;
                     with sparse attention "indexer": IndexerConfig's fields}
    "rope":         {"rope_theta", "rope_interleave", and the fields of Hugging Face's rope_scaling}
    "moe":          null, or MoEConfig's fields
    "quantization": null, or QuantConfig's fields
    "quantization_config": absent, or as in `hf.quantization`

A field may be omitted if the dataclass has a default, or if null is a valid value (TOML has no
null). Unknown fields and fields without effect are errors. `mtp_copies` is no field: the tensors
imply it.

Layers of MLA may differ: a field of "attention" or "rope" is then an array with an entry for each
decoder layer, null where the layer has none ("kv_lora_rank": [96, 224, 128], "short_factor":
[[1.0], [1.0, 7.5], [3.0]]); the other fields, always form and num_attention_heads, are the same
in all layers. MTP modules have the attention of the last layer.
"""

from dataclasses import MISSING, asdict, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lowlat.config.attention import DECOUPLED_ROPE, ModelAttention, distinct, indexer_problem
from lowlat.config.hf.families import LOWLAT, MAX_LAYERS
from lowlat.config.hf.moe import check_routing
from lowlat.config.hf.quantization import PACKED, packing_to_hf, storage_from_hf
from lowlat.config.hf.rope import rope_settings, rope_to_hf
from lowlat.config.model import (
    AttentionConfig,
    GLAConfig,
    GQAConfig,
    GTAConfig,
    IndexerConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    QuantConfig,
    RopeConfig,
    RopeType,
    TPAConfig,
)
from lowlat.utils.json_fields import JsonFields

FORMS: dict[str, type[AttentionConfig]] = {
    "mla": MLAConfig,
    "gqa": GQAConfig,
    "gla": GLAConfig,
    "gta": GTAConfig,
    "tpa": TPAConfig,
}
"""Values of attention.form."""

MINIMA = {
    "num_nextn_predict_layers": 0,
    "n_shared_experts": 0,
    "first_k_dense_replace": 0,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "bos_token_id": 0,
}
"""Integers that may be 0; all others are at least 1."""

MAX_LATENT_GROUPS = 1024
"""Far above any model; keeps a hostile file from asking for lists of 2**31 norms."""

ROPE_NAMES = (
    *(field.name for field in dataclass_fields(RopeConfig) if "pair_factors" not in field.name),
    "short_factor",
    "long_factor",
)
"""Fields of "rope"."""

UNKNOWN = "is unknown; was it written by a newer lowlat?"

NESTED = ("model_type", "attention", "rope", "moe", "quantization", "packing", "mtp_copies")
"""Fields of ModelConfig that are no plain values of the file."""


def config_from_lowlat(fields: JsonFields) -> ModelConfig:
    """The model that `fields` describe.

    Raises UserError naming the field: wrong types and ranges, unknown fields, settings without
    effect, and missing fields without a default.
    """
    fields.choice("model_type", (LOWLAT,))
    fields.ignore("dtype")  # the tensors have their own dtype
    plain = _read(ModelConfig, fields, skip=NESTED)
    for name in ("num_hidden_layers", "num_nextn_predict_layers"):
        if plain.get(name, 0) > MAX_LAYERS:
            raise fields.wrong(name, f"at most {MAX_LAYERS}")
    attention = _attention(fields, plain["num_hidden_layers"])
    if problem := indexer_problem(attention):
        raise _table(fields, "attention").error("indexer", problem)
    moe, quantization = fields.table("moe"), fields.table("quantization")
    if quantization is not None and fields.present("quantization_config"):
        raise fields.error("quantization", "is given together with quantization_config; keep one")
    config = ModelConfig(
        model_type=LOWLAT,
        attention=attention,
        rope=_rope(fields, attention, plain["max_position_embeddings"], plain["num_hidden_layers"]),
        moe=None if moe is None else _moe(moe, plain["num_hidden_layers"]),
        **storage_from_hf(fields, methods=(PACKED,)),
        **plain,
    )
    if quantization is not None:
        config = replace(config, quantization=_quantization(quantization))
    _check_windows(fields, config)
    _reject_unknown(fields)
    return config


def config_to_lowlat(config: ModelConfig) -> dict[str, Any]:
    """The contents of config.json for `config`, without a dtype; the reverse of the above."""
    plain = {
        field.name: _json(getattr(config, field.name))
        for field in dataclass_fields(ModelConfig)
        if field.name not in NESTED
    }
    first = config.attention_of(0)
    form = next(name for name, kind in FORMS.items() if isinstance(first, kind))
    ropes = config.rope if isinstance(config.rope, tuple) else (config.rope,)
    raw = {
        "model_type": LOWLAT,
        **plain,
        "attention": {"form": form}
        | _joined([_attention_to_json(layer) for layer in distinct(config.attention)]),
        "rope": _joined([_rope_to_json(rope) for rope in ropes]),
        "moe": None if config.moe is None else _json(asdict(config.moe)),
        "quantization": None if config.quantization is None else _json(asdict(config.quantization)),
    }
    if config.packing is not None:
        raw["quantization_config"] = packing_to_hf(config.packing)
    return raw


def _attention_to_json(attention: AttentionConfig) -> dict[str, Any]:
    fields = _json(asdict(attention))
    for name in ("attn_output_gate", "sum_groups", "indexer"):
        if not fields.get(name):
            fields.pop(name, None)  # files of models without it have no such field
    indexer = fields.get("indexer")
    if indexer is not None and indexer["index_rope_head_dim"] is None:
        del indexer["index_rope_head_dim"]
    return fields


def _rope_to_json(rope: RopeConfig) -> dict[str, Any]:
    scaling = rope_to_hf(rope)["rope_scaling"] or {}
    return {
        "rope_theta": rope.rope_theta,
        "rope_interleave": rope.rope_interleave,
        **{name: value for name, value in scaling.items() if name != "type"},
    }


def _joined(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the objects of single layers: arrays where values differ."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for layer in layers for name in layer):
        values = [layer.get(name) for layer in layers]
        joined[name] = values[0] if all(value == values[0] for value in values) else values
    return joined


def _json(value: Any) -> Any:
    """`value` with tuples as lists, as JSON reads them back."""
    if isinstance(value, dict):
        return {name: _json(part) for name, part in value.items()}
    return [_json(part) for part in value] if isinstance(value, tuple) else value


def _attention(fields: JsonFields, count: int) -> ModelAttention:
    """The value of all `count` layers, or one per layer."""
    table = _table(fields, "attention")
    form = table.choice("form", tuple(FORMS))
    arrays = table.arrays(count)
    if not arrays:
        return _layer_attention(table, FORMS[form])
    if form != "mla":
        raise table.error(
            arrays[0], f"is an array, but only layers of form 'mla' differ, not '{form}'"
        )
    if "num_attention_heads" in arrays:
        raise table.wrong("num_attention_heads", "an integer, the same for all layers")
    table.reject_names(("form", *(field.name for field in dataclass_fields(MLAConfig))), UNKNOWN)
    layers = (_layer_attention(table.of_layer(i, arrays), MLAConfig) for i in range(count))
    return tuple(layer for layer in layers if isinstance(layer, MLAConfig))


def _layer_attention(table: JsonFields, kind: type[AttentionConfig]) -> AttentionConfig:
    table.ignore("form")
    attention = kind(**_read(kind, table))
    match attention:
        case MLAConfig():
            if attention.q_bias and attention.q_lora_rank is not None:
                raise table.error("q_bias", "belongs to q_proj; set q_lora_rank to null")
            if attention.indexer is not None:
                _check_indexer(table, attention, attention.indexer)
            if attention.qk_head_dim == 0:
                raise table.error("qk_nope_head_dim", "and qk_rope_head_dim are both 0: no queries")
        case GLAConfig():
            table.integer("qk_rope_head_dim")
            table.integer("num_latent_groups", maximum=MAX_LATENT_GROUPS)
            for name in ("num_attention_heads", "kv_lora_rank"):
                _divides(table, name, "num_latent_groups")
        case GQAConfig() | GTAConfig():
            _divides(table, "num_attention_heads", "num_key_value_heads")
            if isinstance(attention, GTAConfig):
                table.integer("qk_rope_head_dim")
        case TPAConfig():
            pass
    if isinstance(attention, GTAConfig) and attention.qk_nope_head_dim < 0:
        raise table.wrong("qk_rope_head_dim", f"at most head_dim {attention.head_dim}")
    if attention.rope_dim % 2:
        name = "qk_rope_head_dim" if isinstance(attention, DECOUPLED_ROPE) else "head_dim"
        raise table.error(name, f"{attention.rope_dim} must be even: channels rotate in pairs")
    _reject_unknown(table)
    return attention


def _check_indexer(table: JsonFields, attention: MLAConfig, indexer: IndexerConfig) -> None:
    width, own = indexer.index_head_dim, indexer.index_rope_head_dim
    rotary = attention.qk_rope_head_dim if own is None else own
    if rotary % 2 or rotary > attention.qk_rope_head_dim:
        most = attention.qk_rope_head_dim
        raise table.wrong("indexer.index_rope_head_dim", f"even and at most {most}")
    if width < rotary:
        raise table.error("indexer.index_head_dim", f"{width} is less than its {rotary} RoPE ones")


def _rope(
    fields: JsonFields, attention: ModelAttention, context: int, count: int
) -> RopeConfig | tuple[RopeConfig, ...]:
    """The value of all `count` layers, or one per layer."""
    table = _table(fields, "rope")
    arrays = table.arrays(count, nested=("short_factor", "long_factor"))
    if not arrays and not isinstance(attention, tuple):
        return _layer_rope(table, attention, context)
    layers = attention if isinstance(attention, tuple) else (attention,) * count
    if not isinstance(layers[0], MLAConfig):
        raise table.error(arrays[0], "is an array, but only layers of form 'mla' differ")
    table.reject_names(ROPE_NAMES, UNKNOWN)
    return tuple(
        _layer_rope(table.of_layer(i, arrays), layer, context) for i, layer in enumerate(layers)
    )


def _layer_rope(table: JsonFields, attention: AttentionConfig, context: int) -> RopeConfig:
    theta = table.positive("rope_theta")
    interleave = table.boolean("rope_interleave", False)
    rope_type: Any = table.choice("rope_type", get_args(RopeType), "default")
    settings = rope_settings(table, table, rope_type, theta, attention.rope_dim, context)
    if settings.get("mscale_all_dim") and not isinstance(attention, DECOUPLED_ROPE):
        raise table.error(
            "mscale_all_dim",
            "belongs to attention with a rotary key of its own (mla, gla, gta); "
            "use attention_factor",
        )
    if (beta := table.number("llama_4_scaling_beta", 0.0)) and isinstance(attention, MLAConfig):
        settings["llama_4_scaling_beta"] = beta
        settings.setdefault("original_max_position_embeddings", context)
    elif beta:
        raise table.unsupported("llama_4_scaling_beta", "only attention of form 'mla' has it (0)")
    table.reject_unread(f"is no setting of rope_type '{rope_type}'; remove it", allow_empty=False)
    return RopeConfig(rope_theta=theta, rope_type=rope_type, rope_interleave=interleave, **settings)


def _moe(table: JsonFields, layers: int) -> MoEConfig:
    moe = MoEConfig(**_read(MoEConfig, table))
    if moe.mlp_layer_types is not None and len(moe.mlp_layer_types) != layers:
        raise table.error(
            "mlp_layer_types", f"has {len(moe.mlp_layer_types)} entries for {layers} layers"
        )
    if moe.topk_method == "greedy" and (moe.n_group, moe.topk_group) != (1, 1):
        raise table.error(
            "topk_method", "'greedy' knows no groups; set n_group and topk_group to 1"
        )
    check_routing(table, moe)
    _reject_unknown(table)
    return moe


def _quantization(table: JsonFields) -> QuantConfig:
    values = _read(QuantConfig, table)
    block = values.get("weight_block_size", (1, 1))
    if len(block) != 2 or not 0 < min(block) <= max(block) <= 2**16:
        raise table.wrong("weight_block_size", "two sizes such as [128, 128]")
    _reject_unknown(table)
    return QuantConfig(**values)


def _check_windows(fields: JsonFields, config: ModelConfig) -> None:
    layers = config.sliding_window_layers
    if config.sliding_window is not None and not isinstance(config.attention, GQAConfig):
        raise fields.unsupported("sliding_window", "only attention of form 'gqa' has one (null)")
    if layers is not None and config.sliding_window is None:
        raise fields.error("sliding_window_layers", "has no effect without sliding_window")
    if layers is not None and max(layers, default=0) >= config.num_cache_layers:
        raise fields.wrong("sliding_window_layers", f"layers below {config.num_cache_layers}")


def _divides(table: JsonFields, name: str, by: str) -> None:
    """Error unless the integer `by` divides the integer `name`."""
    number, divisor = table.integer(name), table.integer(by)
    if number % divisor:
        raise table.error(name, f"{number} is no multiple of {by} {divisor}")


def _table(fields: JsonFields, name: str) -> JsonFields:
    return fields.given(name, fields.table(name), None)


def _reject_unknown(table: JsonFields) -> None:
    table.reject_unread(UNKNOWN, allow_empty=False)


def _read(kind: type, table: JsonFields, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keyword arguments of the dataclass `kind`: its fields but those of `skip` and absent ones."""
    hints = get_type_hints(kind)
    return {
        field.name: _value(table, field.name, hints[field.name])
        for field in dataclass_fields(kind)
        if field.name not in skip and (table.mentioned(field.name) or field.default is MISSING)
    }


def _value(table: JsonFields, name: str, hint: Any) -> Any:
    """The value of a field of type `hint`, checked."""
    if NoneType in get_args(hint):
        if table.value(name) is None:
            return None
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if is_dataclass(hint) and isinstance(hint, type):
        nested = _table(table, name)
        values = _read(hint, nested)
        _reject_unknown(nested)
        return hint(**values)
    if hint is bool:
        return table.boolean(name)
    if hint is int:
        return table.integer(name, minimum=MINIMA.get(name, 1))
    if hint is float:
        return table.positive(name)
    if get_origin(hint) is Literal:
        return table.choice(name, get_args(hint))
    if hint is str:  # scale_fmt, the only one
        return table.choice(name, ("ue8m0",))
    entry = get_args(hint)[0]
    if get_origin(entry) is Literal:
        return _choices(table, name, get_args(entry))
    return table.strings(name) if entry is str else table.integers(name)


def _choices(table: JsonFields, name: str, allowed: tuple[str, ...]) -> tuple[str, ...]:
    values = table.strings(name)
    if not set(values) <= set(allowed):
        raise table.wrong(name, f"an array of {' and '.join(map(repr, allowed))}")
    return values
