"""PEFT's adapter_config.json: the scaling of every update of a LoRA adapter; options that compute
something else than W + scaling B A are refused by name.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lowlat.utils.json_fields import JsonFields

UNUSED = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
"""Fields without effect on a trained adapter, whose tensors show what it updates."""
HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Initializations that leave the base weights as they are."""
RETRAIN = "lowlat computes W + scaling B A; train the adapter without it"
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The numbers of an adapter_config.json that determine the scaling of its updates."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    """Rank by name of module, or by the last part of it, where it differs."""
    alpha_pattern: Mapping[str, float]
    use_rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank of the update of `module`, by its name in checkpoint files."""
        return int(_matched(self.rank_pattern, module, float(self.rank)))

    def scaling(self, module: str) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rank-stabilized LoRA."""
        rank = self.rank_of(module)
        return _matched(self.alpha_pattern, module, self.alpha) / (
            math.sqrt(rank) if self.use_rslora else rank
        )


def adapter_config(raw: object, source: str) -> AdapterConfig:
    """The config in the JSON object `raw`. Raises UserError naming `source` and field."""
    fields = JsonFields(raw, source)
    fields.choice("peft_type", ("LORA",))
    if fields.value("bias") not in (None, "none"):
        raise fields.unsupported("bias", "train the adapter with bias none")
    if fields.value("init_lora_weights") not in (*HARMLESS_INITS, None):
        raise fields.unsupported(
            "init_lora_weights", "it changes the base weights; convert the adapter to plain LoRA"
        )
    config = AdapterConfig(
        rank=fields.integer("r"),
        alpha=fields.number("lora_alpha", minimum=-math.inf),
        rank_pattern=_pattern(fields, "rank_pattern"),
        alpha_pattern=_pattern(fields, "alpha_pattern"),
        use_rslora=fields.boolean("use_rslora", False),
    )
    fields.ignore(*UNUSED)
    # DoRA, modules_to_save, trainable_token_indices, target_parameters, lora_bias, ...
    fields.reject_unread(f"is not supported; {RETRAIN}")
    return config


def _pattern(fields: JsonFields, name: str) -> dict[str, float]:
    """Numbers by module. PEFT takes regular expressions; plain names are supported."""
    raw = fields.value(name) or {}
    if not isinstance(raw, dict):
        raise fields.wrong(name, "an object of numbers by module")
    found: dict[str, float] = {}
    for key, value in raw.items():
        if not _PATTERN.fullmatch(key):
            raise fields.error(name, f"has the pattern {key!r}; list plain names of modules")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise fields.error(f"{name}.{key}", "must be a finite number")
        if name == "rank_pattern" and (value != int(value) or value < 1):
            raise fields.error(f"{name}.{key}", "must be a positive integer")
        found[key] = float(value)
    return found


def _matched(pattern: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first key that is the name of `module`, or its end after a dot (not with a
    leading ^)."""
    for key, value in pattern.items():
        if module == key.removeprefix("^") or module.endswith(f".{key}"):
            return value
    return default
