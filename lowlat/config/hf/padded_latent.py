"""The "lowlat" object of config.json: exactly converted models that standard readers load, too.

Such a file is a standard deepseek_v3 config plus one key:

    "lowlat": {"kv_lora_rank": r, "kv_a_layernorm": false, "q_bias": b, "o_bias": o}

All four keys are required and no other is allowed. The numbers outside the object are those of the
padded tensors (`checkpoint.padded_latent`), for other programs: kv_lora_rank is `padded_rank(r)`;
attention_bias is true; q_lora_rank is null, or `padded_rank(hidden_size)` if b is true. The object
holds the converted model's own numbers: latent width r, no kv_a_layernorm, and a plain q_proj
(q_lora_rank null) with a bias if b is true. Queries, keys and values have biases together or not at
all, so attention_bias is b; o_proj has a bias if b or o is true.
"""

from dataclasses import replace
from typing import Any

from lowlat.config.model import MLAConfig
from lowlat.utils.errors import UserError
from lowlat.utils.json_fields import JsonFields

KEY = "lowlat"


def padded_rank(rank: int) -> int:
    """Width of a latent of `rank` channels plus one constant in 64: 64 * ceil(rank / 63)."""
    return 64 * -(-rank // 63)


def native_attention(fields: JsonFields, standard: MLAConfig, model_type: str) -> MLAConfig:
    """The attention lowlat uses: `standard`, or that of the "lowlat" object."""
    table = fields.table(KEY)
    if table is None:
        return standard
    if model_type != "deepseek_v3":
        raise fields.error(
            KEY, f"belongs to model_type 'deepseek_v3', not '{model_type}'; remove it"
        )
    rank = table.integer("kv_lora_rank")
    if table.boolean("kv_a_layernorm"):
        raise table.unsupported("kv_a_layernorm", "a converted latent is not normalised (false)")
    q_bias, o_bias = table.boolean("q_bias"), table.boolean("o_bias")
    table.reject_unread("is unknown; was it written by a newer lowlat?", allow_empty=False)
    query_rank = padded_rank(fields.integer("hidden_size")) if q_bias else None
    if standard.kv_lora_rank != padded_rank(rank):
        raise fields.wrong("kv_lora_rank", f"{padded_rank(rank)} to match lowlat.kv_lora_rank")
    if standard.q_lora_rank != query_rank:
        raise fields.wrong("q_lora_rank", f"{query_rank or 'null'} to match lowlat.q_bias")
    if not standard.attention_bias:
        raise fields.wrong("attention_bias", "true with 'lowlat', whose constants are biases")
    return replace(
        standard,
        kv_lora_rank=rank,
        q_lora_rank=None,
        attention_bias=q_bias,
        q_bias=q_bias,
        o_bias=o_bias,
        kv_a_layernorm=False,
    )


def extension_to_hf(native: MLAConfig, hidden_size: int) -> dict[str, Any]:
    """Fields of a converted model: the padded standard numbers and the "lowlat" object.

    Raises UserError for biases that the object cannot express.
    """
    if native.attention_bias != native.q_bias or native.q_lora_rank is not None:
        raise UserError(
            "a converted model has biases on queries, keys and values together and no q_lora_rank; "
            f"this one has q_bias {native.q_bias}, attention_bias {native.attention_bias} "
            f"and q_lora_rank {native.q_lora_rank}"
        )
    return {
        "kv_lora_rank": padded_rank(native.kv_lora_rank),
        "q_lora_rank": padded_rank(hidden_size) if native.q_bias else None,
        "attention_bias": True,
        KEY: {
            "kv_lora_rank": native.kv_lora_rank,
            "kv_a_layernorm": False,
            "q_bias": native.q_bias,
            "o_bias": native.o_bias,
        },
    }
