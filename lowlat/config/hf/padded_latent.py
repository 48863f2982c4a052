"""The "lowlat" object of config.json: exactly converted models that standard readers load, too.

Such a file is a standard deepseek_v3 config plus one key:

    "lowlat": {"kv_lora_rank": r, "kv_a_layernorm": false, "q_bias": b, "o_bias": o}

All four keys are required and no other is allowed. The latent of the converted model is r channels
wide and must reach kv_b_proj unscaled, and its q_proj may have a bias; a standard deepseek_v3 can
express neither. So the file describes one function twice:

- **Standard numbers, outside the object** (read by other programs; the shapes of the tensors in the
file): kv_lora_rank is `padded_rank(r)`. Of every 64 latent channels one holds a large constant,
which makes the normalisation of kv_a_layernorm the identity; the constant comes from the bias of
kv_a_proj_with_mqa, hence attention_bias is true, and kv_a_proj_with_mqa and o_proj have biases
(zero where the model has none). q_lora_rank is null if b is false. If b is true it is
`padded_rank(hidden_size)`: q_a_proj passes the hidden state through and appends constant channels
(its own bias again), from which q_b_proj makes the bias of the queries. - **Native numbers, inside
the object** (used by lowlat): latent width r, no kv_a_layernorm, a plain q_proj (q_lora_rank null)
with a bias if b is true, and a bias on o_proj if o is true. Queries, keys and values have biases
together or not at all, so b also determines whether kv_a_proj_with_mqa has a bias: the native
attention_bias is b. If attention_bias is true it covers o_proj too, whatever o is.

Owns these numbers; the tensors are `checkpoint.padded_latent`'s.
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
    _check_standard_numbers(fields, standard, padded_rank(rank), query_rank)
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


def _check_standard_numbers(
    fields: JsonFields, standard: MLAConfig, rank: int, query_rank: int | None
) -> None:
    if standard.kv_lora_rank != rank:
        raise fields.wrong("kv_lora_rank", f"{rank} to match lowlat.kv_lora_rank")
    if standard.q_lora_rank != query_rank:
        raise fields.wrong("q_lora_rank", f"{query_rank or 'null'} to match lowlat.q_bias")
    if not standard.attention_bias:
        raise fields.wrong("attention_bias", "true with 'lowlat', whose constants are biases")
