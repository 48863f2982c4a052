"""RoPE settings of config.json <-> RopeConfig, in the old and the new spelling.

Old: `rope_theta` next to `rope_scaling` {"type" or "rope_type", ...}; new: `rope_parameters` with
all of it. `ops.rope` computes the frequencies.
"""

import math
from typing import Any, get_args

from lowlat.config.model import RopeConfig, RopeType
from lowlat.utils.json_fields import JsonFields

DEFAULT_THETA = {
    "llama": 10000.0,
    "mistral": 10000.0,
    "deepseek_v2": 10000.0,
    "deepseek_v3": 10000.0,
    "minicpm3": 10000.0,
}
"""Families whose first checkpoints left rope_theta out; for the others it must be there."""


def rope_from_hf(
    fields: JsonFields,
    *,
    model_type: str,
    dim: int,
    context: int,
    interleave: bool,
    rotated: float = 1.0,
) -> RopeConfig:
    """The rotary settings of `fields`; `dim` rotated channels, `context` = max_position_embeddings,
    rotated: the value of partial_rotary_factor, where it is given.

    Raises UserError for anything but the types of RopeType, and for settings that contradict one
    another.
    """
    table = _scaling_table(fields)
    theta = _theta(fields, table, model_type)
    for place in (fields, table):
        if not math.isclose(place.number("partial_rotary_factor", rotated), rotated):
            raise place.unsupported(
                "partial_rotary_factor", f"every rotary channel must rotate ({rotated:g})"
            )
    kind = table.spelling("rope_type", "type")
    rope_type: Any = table.choice(kind, get_args(RopeType), "default")
    settings = rope_settings(fields, table, rope_type, theta, dim, context)
    if model_type == "mistral4":
        table.ignore("max_position_embeddings")
        settings |= _query_scaling(fields, table, context)
    table.reject_unread(f"is not a setting of rope_type '{rope_type}' that lowlat knows; remove it")
    return RopeConfig(rope_theta=theta, rope_type=rope_type, rope_interleave=interleave, **settings)


def _query_scaling(fields: JsonFields, table: JsonFields, context: int) -> dict[str, Any]:
    """Mistral 4 scales queries by their position, whatever the rope_type."""
    beta = table.number("llama_4_scaling_beta", 0.0)
    if beta == 0.0:
        return {}
    original = _original_context(fields, table) or context
    return {"llama_4_scaling_beta": beta, "original_max_position_embeddings": original}


def rope_to_hf(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`: the old spelling, which old and new readers understand."""
    if rope.rope_type == "default" and not rope.llama_4_scaling_beta:
        return {"rope_theta": rope.rope_theta, "rope_scaling": None}
    # readers of the first DeepSeek checkpoints look for "type", later ones for "rope_type"
    scaling: dict[str, Any] = {"rope_type": rope.rope_type, "type": rope.rope_type}
    if rope.rope_type != "default":
        scaling["factor"] = rope.factor
    if rope.rope_type == "yarn":
        scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        scaling |= {"truncate": rope.truncate, "mscale": rope.mscale}
    if rope.rope_type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
    if rope.pair_factors is not None:
        scaling["short_factor"] = list(rope.pair_factors)
        scaling["long_factor"] = list(rope.long_pair_factors or rope.pair_factors)
    scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    scaling |= {"mscale_all_dim": rope.mscale_all_dim, "attention_factor": rope.attention_factor}
    scaling["llama_4_scaling_beta"] = rope.llama_4_scaling_beta or None
    given = {name: value for name, value in scaling.items() if value is not None}
    return {"rope_theta": rope.rope_theta, "rope_scaling": given}


def _scaling_table(fields: JsonFields) -> JsonFields:
    """The object with the scaling rule; empty if the file has none."""
    old, new = fields.table("rope_scaling"), fields.table("rope_parameters")
    if old is not None and new is not None:
        raise fields.error(
            "rope_scaling", "is given together with rope_parameters; keep rope_parameters"
        )
    return new or old or JsonFields({}, "")


def _theta(fields: JsonFields, table: JsonFields, model_type: str) -> float:
    inner, outer = table.optional_number("rope_theta"), fields.optional_number("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        raise fields.error("rope_theta", f"{outer:g} contradicts rope_theta {inner:g} nested below")
    place = fields if inner is None else table
    return place.positive("rope_theta", DEFAULT_THETA.get(model_type))


def rope_settings(
    fields: JsonFields, table: JsonFields, rope_type: RopeType, theta: float, dim: int, context: int
) -> dict[str, Any]:
    """Keyword arguments of RopeConfig that belong to `rope_type`, read from `table`, an object of
    `fields`; only these count as read.
    """
    original = _original_context(fields, table)
    shared = {"mscale_all_dim": table.optional_number("mscale_all_dim")}
    match rope_type:
        case "default":
            return {}
        case "linear":
            return {"factor": table.number("factor", minimum=1.0), **shared}
        case "llama3":
            return _llama3(table, original or context)
        case "yarn":
            return _yarn(table, theta, context, original or context) | shared
        case "longrope":
            return _longrope(table, dim, context, original or context) | shared


def _original_context(fields: JsonFields, table: JsonFields) -> int | None:
    """original_max_position_embeddings, which some files put outside the rotary settings."""
    name = "original_max_position_embeddings"
    inner, outer = table.optional_integer(name), fields.optional_integer(name)
    if inner is not None and outer is not None and inner != outer:
        raise fields.error(name, f"{outer} contradicts {inner} in the rotary settings; keep one")
    return outer if inner is None else inner


def _llama3(table: JsonFields, original: int) -> dict[str, Any]:
    low, high = table.positive("low_freq_factor"), table.positive("high_freq_factor")
    if high <= low:
        raise table.error("high_freq_factor", f"{high:g} must be above low_freq_factor {low:g}")
    return {
        "factor": table.number("factor", minimum=1.0),
        "original_max_position_embeddings": original,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _yarn(table: JsonFields, theta: float, context: int, original: int) -> dict[str, Any]:
    if theta <= 1.0:
        raise table.error("rope_theta", f"{theta:g} must be above 1 with rope_type 'yarn'")
    fast, slow = table.positive("beta_fast", 32.0), table.positive("beta_slow", 1.0)
    if fast < slow:
        raise table.error("beta_fast", f"{fast:g} must not be below beta_slow {slow:g}")
    return {
        "factor": table.number("factor", max(context / original, 1.0), minimum=1.0),
        "original_max_position_embeddings": original,
        "beta_fast": fast,
        "beta_slow": slow,
        "truncate": table.boolean("truncate", True),
        "mscale": table.optional_number("mscale"),
        "attention_factor": table.optional_number("attention_factor"),
    }


def _longrope(table: JsonFields, dim: int, context: int, original: int) -> dict[str, Any]:
    short, long = (table.numbers(name, dim // 2) for name in ("short_factor", "long_factor"))
    factor = table.positive("factor", context / original)
    return {
        "factor": factor,
        "original_max_position_embeddings": original,
        "attention_factor": _longrope_attention_factor(table, factor, original),
        "pair_factors": short,
        "long_pair_factors": None if long == short else long,
    }


def _longrope_attention_factor(table: JsonFields, factor: float, original: int) -> float:
    """The cos/sin factor: explicit, or sqrt(1 + ln(factor) / ln(original)) (arXiv 2402.13753)."""
    explicit = table.optional_number("attention_factor")
    if explicit is not None:
        return explicit
    if factor <= 1.0:
        return 1.0
    if original == 1:
        raise table.error("original_max_position_embeddings", "1 leaves attention_factor undefined")
    return math.sqrt(1.0 + math.log(factor) / math.log(original))
