"""GGUF metadata -> config fields of Hugging Face's config.json.

Architectures llama (mistral included), qwen2, qwen3, deepseek2 (V2, V3 and their relatives),
deepseek32 (V3.2) and glm-dsa (GLM-5). An unknown key of the architecture is an error, because it
may change the computation.
`metadata_writer` is the other direction.
"""

from collections.abc import Callable, Iterable
from typing import Any

from lowlat.checkpoint.gguf.file import GGUFFile
from lowlat.config.hf import families
from lowlat.text.gguf_vocab import ALL_ENDS
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import quoted

SPARSE = {"deepseek32": "deepseek_v32", "glm-dsa": "glm_moe_dsa"}
"""Architectures with sparse attention (DSA), and their model_type."""
ARCHITECTURES = ("llama", "qwen2", "qwen3", "deepseek2", *SPARSE)
LONG_CONTEXT = 2**20
"""glm-dsa files of this context or more that list no indexers have those of GLM-5.2."""
GATES = {1: "softmax", 2: "sigmoid"}
IGNORED = (
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.causal",
    "attention.layer_norm_epsilon",
    "decoder_start_token_id",
    "expert_shared_feed_forward_length",
    "pooling_type",
    "vocab_size",
)
"""Keys below the architecture without effect; sizes of weights are those of the tensors."""
NEUTRAL: dict[str, tuple[float, ...]] = {
    "activation_sparsity_scale": (0, 1),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_group_scale": (0, 1),
    "experts_per_group": (0,),
    "final_logit_softcapping": (0,),
    "interleave_moe_layer_step": (0, 1),
    "logit_scale": (0, 1),
    "moe_every_n_layers": (0, 1),
    "n_deepstack_layers": (0,),
    "rescale_every_n_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "router_logit_softcapping": (0,),
    "swiglu_clamp_exp": (0,),
    "swiglu_clamp_shexp": (0,),
    "swin_norm": (0,),
    "use_parallel_residual": (0, 1),
}
"""Keys that converters write for every architecture, and the values without effect (llama.cpp's
loader). Lists have one value per layer."""
EXPERT_NUMBERS = (
    "expert_used_count",
    "expert_shared_count",
    "expert_feed_forward_length",
    "expert_group_used_count",
)
"""Keys without effect in a model without experts."""

WHOLE = "one whole number >= 0"

_REQUIRED: Any = object()


class _Keys:
    """Typed access to the architecture's keys; tracks which were read."""

    def __init__(self, file: GGUFFile, arch: str):
        self.path = file.path
        self.prefix = f"{arch}."
        self.values = {
            key.removeprefix(self.prefix): value
            for key, value in file.metadata.items()
            if key.startswith(self.prefix)
        }
        self.read = {key for key in self.values if key in IGNORED or self._is_neutral(key)}

    def error(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.path}: key {self.prefix + key!r} {problem}")

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._checked(key, default, lambda v: type(v) is int and 0 <= v < 2**31, WHOLE)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        return self._checked(key, default, lambda v: type(v) in (int, float), "a number")

    def text(self, key: str, default: str) -> str:
        return self._checked(key, default, lambda v: isinstance(v, str), "a text")

    def boolean(self, key: str, default: bool) -> bool:
        return self._checked(key, default, lambda v: isinstance(v, bool), "true or false")

    def numbers(self, key: str) -> list[int] | None:
        """A list of 0 and 1, or of false and true; None if absent."""
        return self._checked(
            key, None, lambda v: isinstance(v, list) and set(v) <= {0, 1}, "a list of 0 and 1"
        )

    def reject_unread(self) -> None:
        unread = [key for key in self.values if key not in self.read]
        if unread:
            raise self.error(
                unread[0], "is unknown and may change the computation; this model is not supported"
            )

    def _is_neutral(self, key: str) -> bool:
        value = self.values[key]
        numbers = value if isinstance(value, list) else [value]
        return all(number in NEUTRAL.get(key, ()) for number in numbers)

    def _checked(
        self, key: str, default: Any, is_valid: Callable[[Any], bool], expected: str
    ) -> Any:
        self.read.add(key)
        if key not in self.values:
            if default is _REQUIRED:
                raise self.error(key, "is missing; convert the model with a current llama.cpp")
            return default
        value = self.values[key]
        if not is_valid(value):
            raise self.error(key, f"is {quoted(str(value))}, not {expected}")
        return value


def architecture(file: GGUFFile) -> str:
    """The file's architecture. Raises UserError for those not supported."""
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: general.architecture {quoted(str(arch))} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    return arch


def hf_config(file: GGUFFile, vocab_size: int) -> dict[str, Any]:
    """The config of the model in `file`. Raises UserError naming the key at fault."""
    arch = architecture(file)
    keys = _Keys(file, arch)
    config = _common(file, keys, vocab_size)
    is_latent = arch == "deepseek2" or arch in SPARSE
    config |= _deepseek(file, keys) if is_latent else _dense(file, keys, arch)
    if arch in SPARSE:
        config |= _indexers(keys, arch, config)
    config |= _rope(file, keys)
    keys.reject_unread()
    return {"architectures": [families.ARCHITECTURES[config["model_type"]]], **config}


def mtp_layers(file: GGUFFile, blocks: Iterable[int]) -> int:
    """Number of MTP modules, which are the last ones of the blocks."""
    return sum(f"blk.{block}.nextn.eh_proj.weight" in file.tensors for block in blocks)


def _common(file: GGUFFile, keys: _Keys, vocab_size: int) -> dict[str, Any]:
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


def _token(file: GGUFFile, role: str) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    token = file.metadata.get(key)
    if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
        raise UserError(f"{file.path}: key {key!r} is {quoted(str(token))}, not a token id")
    return token


def _end_tokens(file: GGUFFile) -> list[int]:
    """End tokens of text, turn and message, or the full list that lowlat writes."""
    key = f"tokenizer.{ALL_ENDS}"
    listed = file.metadata.get(key)
    if listed is not None:
        if not isinstance(listed, list) or not all(type(token) is int for token in listed):
            raise UserError(f"{file.path}: key {key!r} is not a list of token ids")
        return listed
    tokens = [_token(file, role) for role in ("eos", "eot", "eom")]
    return list(dict.fromkeys(token for token in tokens if token is not None))


def _dense(file: GGUFFile, keys: _Keys, arch: str) -> dict[str, Any]:
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


def _deepseek(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    """DeepSeek V2 or V3; the gate function distinguishes them: softmax or sigmoid."""
    layers, mtp = _layer_counts(file, keys)
    heads = keys.integer("attention.head_count")
    if keys.integer("attention.head_count_kv", heads) not in (1, heads):
        raise keys.error("attention.head_count_kv", f"must be 1 or {heads}")
    return {
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": mtp,
        "num_key_value_heads": heads,
        "attention_bias": False,
        **_latent_sizes(keys),
        **_experts(keys),
    }


def _indexers(keys: _Keys, arch: str, config: dict[str, Any]) -> dict[str, Any]:
    """Sparse attention; glm-dsa lists the layers that have an indexer."""
    if config["model_type"] != "deepseek_v3":
        raise keys.error("expert_gating_func", f"must be 2, sigmoid, in architecture {arch}")
    found: dict[str, Any] = {
        "model_type": SPARSE[arch],
        "index_n_heads": keys.integer("attention.indexer.head_count"),
        "index_head_dim": keys.integer("attention.indexer.key_length"),
        "index_topk": keys.integer("attention.indexer.top_k"),
    }
    types = keys.numbers("attention.indexer.types")
    if types is not None:
        found["indexer_types"] = ["full" if number else "shared" for number in types]
    elif arch == "glm-dsa" and config["max_position_embeddings"] >= LONG_CONTEXT:
        found |= {"index_topk_freq": 4, "index_skip_topk_offset": 3}
    return found


def _layer_counts(file: GGUFFile, keys: _Keys) -> tuple[int, int]:
    """Numbers of layers and of MTP modules: the last blocks. Files made without the modules may
    still declare and count them.
    """
    blocks = keys.integer("block_count")
    first = max(blocks - keys.integer("nextn_predict_layers", 0), 0)
    mtp = mtp_layers(file, range(first, blocks))
    if any(name.startswith(f"blk.{first}.") for name in file.tensors):
        return blocks - mtp, mtp
    return first, mtp


def _latent_sizes(keys: _Keys) -> dict[str, Any]:
    """Head sizes: the `_mla` keys if the file stores absorbed MLA, else the plain ones."""
    rank = keys.integer("attention.kv_lora_rank")
    rope_dim = keys.integer("rope.dimension_count")
    key_length = keys.integer("attention.key_length")
    value_length = keys.integer("attention.value_length")
    if "attention.key_length_mla" in keys.values:
        if (key_length, value_length) != (rank + rope_dim, rank):
            raise keys.error(
                "attention.key_length", f"must be kv_lora_rank + rope width = {rank + rope_dim}"
            )
        key_length = keys.integer("attention.key_length_mla")
        value_length = keys.integer("attention.value_length_mla")
    if key_length < rope_dim:
        raise keys.error(
            "attention.key_length", f"{key_length} is less than the rope width {rope_dim}"
        )
    return {
        "kv_lora_rank": rank,
        "q_lora_rank": keys.integer("attention.q_lora_rank", 0) or None,
        "qk_nope_head_dim": key_length - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": value_length,
    }


def _experts(keys: _Keys) -> dict[str, Any]:
    """Routing. The format's defaults are no expert groups, and softmax as the gate."""
    gate = keys.integer("expert_gating_func", 1)
    if gate not in GATES:
        raise keys.error(
            "expert_gating_func", f"{gate} is not supported; 1 is softmax, 2 is sigmoid"
        )
    sigmoid = GATES[gate] == "sigmoid"
    groups = max(keys.integer("expert_group_count", 1), 1)
    family = "deepseek_v3" if sigmoid else "deepseek_v2"
    softmax_method = "group_limited_greedy" if groups > 1 else "greedy"
    blocks, dense = keys.integer("block_count"), keys.integer("leading_dense_block_count")
    if dense >= blocks and not keys.integer("expert_count", 0):
        for key in (*EXPERT_NUMBERS, "expert_weights_norm", "expert_weights_scale"):
            keys.read.add(key)
        return {"model_type": family, "n_routed_experts": None, "first_k_dense_replace": dense}
    return {
        "model_type": family,
        "scoring_func": GATES[gate],
        "topk_method": "noaux_tc" if sigmoid else softmax_method,
        "n_group": groups,
        "topk_group": max(keys.integer("expert_group_used_count", 1), 1),
        "n_routed_experts": keys.integer("expert_count"),
        "num_experts_per_tok": keys.integer("expert_used_count"),
        "n_shared_experts": keys.integer("expert_shared_count"),
        "moe_intermediate_size": keys.integer("expert_feed_forward_length"),
        "first_k_dense_replace": dense,
        "moe_layer_freq": 1,
        "norm_topk_prob": keys.boolean("expert_weights_norm", False),
        "routed_scaling_factor": keys.number("expert_weights_scale", 1.0),
    }


def _rope(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    config: dict[str, Any] = {"rope_theta": keys.number("rope.freq_base", 10000.0)}
    kind = keys.text("rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        if kind != "none":
            raise keys.error(
                "rope.scaling.type", f"{kind!r} with rope_freqs.weight is not supported"
            )
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


def _yarn(keys: _Keys) -> dict[str, Any]:
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


def _frequency_divisors(file: GGUFFile, keys: _Keys) -> dict[str, Any]:
    """Llama 3's scaling, stored as one divisor per frequency: longrope with equal factors."""
    divisors = file.read("rope_freqs.weight").flatten().tolist()
    return {
        "rope_type": "longrope",
        "short_factor": divisors,
        "long_factor": divisors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": keys.integer("context_length"),
    }
