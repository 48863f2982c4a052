"""GGUF metadata -> config fields of Hugging Face's config.json.

Architectures llama (mistral included), qwen2, qwen3, and those of `metadata_mla`. An unknown key of
the architecture is an error, because it may change the computation. `metadata_writer` is the other
direction.
"""

from typing import Any

from lowlat.checkpoint.gguf.metadata_keys import Keys, KeysAndTensors
from lowlat.checkpoint.gguf.metadata_mla import (
    MINICPM3,
    MISTRAL4,
    SPARSE,
    deepseek,
    indexers,
    minicpm3,
)
from lowlat.checkpoint.gguf.tensor_layout import LONG_FACTORS, ROPE_FACTORS, SHORT_FACTORS
from lowlat.config.hf import families
from lowlat.text.gguf_vocab import ALL_ENDS
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2", *SPARSE, MISTRAL4, MINICPM3)


def architecture(file: KeysAndTensors) -> str:
    """The file's architecture. Raises UserError for those not supported."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: general.architecture {quoted(str(arch))} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return arch


def hf_config(file: KeysAndTensors, vocab_size: int) -> dict[str, Any]:
    """The config of the model in `file`. Raises UserError naming the key at fault."""
    arch = architecture(file)
    keys = Keys(file, arch)
    config = _common(file, keys, vocab_size)
    match arch:
        case "llama" | "qwen2" | "qwen3":
            config |= _dense(file, keys, arch) | _rope(file, keys)
        case "minicpm3":
            config |= minicpm3(keys) | _factors_rope(file, keys)
        case _:
            config |= deepseek(file, keys, arch) | _rope(file, keys)
    if arch in SPARSE:
        config |= indexers(keys, arch, config)
    if arch == MISTRAL4:
        config |= _query_scaling(keys, config)
    keys.reject_unread()
    return {"architectures": [families.ARCHITECTURES[config["model_type"]]], **config}


def _common(file: KeysAndTensors, keys: Keys, vocab_size: int) -> dict[str, Any]:
    return {
        "hidden_size": keys.integer("embedding_length"),
        "intermediate_size": keys.integer("feed_forward_length"),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": keys.integer("attention.head_count"),
        "max_position_embeddings": keys.integer("context_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": _token(file, "bos"),
        "eos_token_id": _end_tokens(file),
    }


def _token(file: KeysAndTensors, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    token = file.metadata.get(key)
    if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
        raise UserError(f"{file.path}: key {key!r} is {quoted(str(token))}, not a token id")
    return token


def _end_tokens(file: KeysAndTensors) -> list[int]:
    """End tokens of text, turn and message, or the full list that lowlat writes."""
    key = f"tokenizer.{ALL_ENDS}"
    listed = file.metadata.get(key)
    if listed is not None:
        if not isinstance(listed, list) or not all(type(token) is int for token in listed):
            raise UserError(f"{file.path}: key {key!r} is not a list of token ids")
        return listed
    tokens = [_token(file, role) for role in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _dense(file: KeysAndTensors, keys: Keys, arch: str) -> dict[str, Any]:
    heads, hidden = keys.integer("attention.head_count"), keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", hidden // heads if heads else 0)
    for key in ("rope.dimension_count", "attention.value_length"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.error(key, f"differs from the head width {head_dim}; that is not supported")
    if keys.integer("expert_count", 0) or keys.integer("expert_used_count", 0):
        raise keys.error("expert_count", f"experts of architecture {arch} are not supported")
    config: dict[str, Any] = {
        "model_type": arch,
        "num_key_value_heads": keys.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
    }
    window = keys.integer("attention.sliding_window", None)
    if arch == "llama" and window:
        return config | {"model_type": "mistral", "sliding_window": window}
    if window:
        raise keys.error("attention.sliding_window", f"is not supported in {arch} files")
    if arch != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    return config


def _rope(file: KeysAndTensors, keys: Keys) -> dict[str, Any]:
    config: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.text("rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise keys.error("rope.scaling.type", f"{kind!r} with {ROPE_FACTORS} is not supported")
        return config | {"rope_scaling": _frequency_divisors(file, keys)}
    if kind == "none":
        keys.number("rope.scaling.factor", 1.0)
        return config
    scaling: dict[str, Any] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling |= _yarn(keys)
    elif kind != "linear":
        raise keys.error(
            "rope.scaling.type", f"{quoted(kind)} is not supported; supported are linear and yarn"
        )
    return config | {"rope_scaling": scaling}


def _yarn(keys: Keys) -> dict[str, Any]:
    """The log multiplier is 0.1 * mscale_all_dim; the format has no mscale apart from it."""
    scaling: dict[str, Any] = {
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length"),
        "beta_fast": keys.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": keys.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    multiplier = keys.number("rope.scaling.yarn_log_multiplier", None)
    if multiplier:
        mscale = round(10 * multiplier, 6)
        scaling |= {"mscale": mscale, "mscale_all_dim": mscale}
    return scaling


def _frequency_divisors(file: KeysAndTensors, keys: Keys) -> dict[str, Any]:
    """Llama 3's scaling, stored as one divisor per frequency: longrope with equal factors."""
    divisors = file.read(ROPE_FACTORS).flatten().tolist()
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": keys.integer("context_length"),
    }


def _factors_rope(file: KeysAndTensors, keys: Keys) -> dict[str, Any]:
    """longrope with one divisor per frequency, of a short and of a long context (minicpm3)."""
    config: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.text("rope.scaling.type", "none")
    if kind not in ("none", "longrope"):
        raise keys.error("rope.scaling.type", f"is {quoted(kind)}, not none or longrope")
    context = keys.integer("context_length")
    original = keys.integer("rope.scaling.original_context_length", context)
    missing = [name for name in (SHORT_FACTORS, LONG_FACTORS) if name not in file.tensors]
    if len(missing) == 1:
        raise UserError(f"{file.path}: tensor {quoted(missing[0])} is missing; get the file again")
    if missing:
        return config
    factors = [file.read(name).flatten().tolist() for name in (SHORT_FACTORS, LONG_FACTORS)]
    scaling = {
        "rope_type": "longrope",
        "short_factor": factors[0],
        "long_factor": factors[1],
        "attention_factor": keys.number("rope.scaling.attn_factor", 1.0) or 1.0,
        "original_max_position_embeddings": original,
    }
    return config | {"rope_scaling": scaling}


def _query_scaling(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """The RoPE fields of `config` with the factor on queries that grows with their position
    (mistral4).
    """
    beta = keys.number("attention.temperature_scale", 0.0)
    length = keys.integer("attention.temperature_length", 0)
    if not beta:
        return {}
    name = "original_max_position_embeddings"
    scaling = config.get("rope_scaling", {"rope_type": "default"})
    if not length or scaling.get(name, length) != length:
        raise keys.error(
            "attention.temperature_length",
            f"is {length}, not rope.scaling.original_context_length; that is not supported",
        )
    return {"rope_scaling": scaling | {"llama_4_scaling_beta": beta, name: length}}
