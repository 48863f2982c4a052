"""Conversion report: sizes before and after, and conversion.json with losses per layer."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowlat.checkpoint.hf_folder import weight_files
from lowlat.config.attention import ModelAttention, distinct, entry_widths, short_name
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, MoEConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.convert import report_plot
from lowlat.convert.compression.compress import CompressionReport

CACHE_DTYPE = "bf16"
REPORT_FILE = "conversion.json"
"""In the folder of a compressed model: `compression_object`, and recovery training results."""
PLOT_FILE = "conversion.svg"
"""The same as a plot, if matplotlib is installed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """Sizes before (of the source) and after (of the destination). Cache sizes are lowlat's, of all
    layers together, in bf16 unless named otherwise.
    """

    source: Path
    destination: Path
    attention_before: str
    """'GQA, 9 heads in 3 groups of 64'."""
    attention_after: str
    """'MLA, 9 heads, latent 192 + rotary key 192'."""
    cache_bytes_per_token_before: int
    cache_bytes_per_token_after: int
    cache_bytes_per_token_int8: int
    """After, in an int8 cache."""
    parameters_before: int
    """Without MTP modules; a tied head counts once."""
    parameters_after: int
    """As lowlat loads it, without the padding in the files for other programs."""
    weight_bytes_before: int
    """Size of the weight files."""
    weight_bytes_after: int
    bits_per_weight_before: float
    """Bits of the weight files per parameter, MTP modules included."""
    bits_per_weight_after: float
    experts: str | None
    """Experts made of every dense layer ('8 routed, 2 active per token, 1 shared'), or None."""
    seconds: float
    """From opening the source to the finished destination."""
    compression: CompressionReport | None = None
    """Result of the compression; None for exact conversions."""


def measure(
    src: Path, dst: Path, config: ModelConfig, converted: ModelConfig, seconds: float
) -> ConversionReport:
    """The report of a conversion from `src` (a model of `config`) to `dst` (of `converted`)."""
    counts = count_parameters(config), count_parameters(converted)
    sizes = [sum(file.stat().st_size for file in weight_files(path)) for path in (src, dst)]
    bits = [
        8 * size / (count.total + count.mtp + count.mtp_copies * config.mtp_copies)
        for size, count in zip(sizes, counts, strict=True)
    ]
    return ConversionReport(
        source=src,
        destination=dst,
        **_attention_sizes(config, converted),
        parameters_before=counts[0].total,
        parameters_after=counts[1].total,
        weight_bytes_before=sizes[0],
        weight_bytes_after=sizes[1],
        bits_per_weight_before=bits[0],
        bits_per_weight_after=bits[1],
        experts=None if config.moe == converted.moe else _describe_experts(converted.moe),
        seconds=seconds,
    )


def compression_object(
    compressed: CompressionReport, config: ModelConfig, converted: ModelConfig
) -> dict[str, Any]:
    """The object of conversion.json: all of `compressed`, each layer's rotary share of its cache
    entry, and the cache sizes of the models before (`config`) and after.
    """
    layers = [
        asdict(layer) | {"rotary_share": layer.rotary / (layer.latent + layer.rotary)}
        for layer in compressed.layers
    ]
    report = asdict(compressed) | _attention_sizes(config, converted) | {"layers": layers}
    if converted.moe is not None:
        report["routed_experts"] = converted.moe.n_routed_experts
    return report


def _attention_sizes(config: ModelConfig, converted: ModelConfig) -> dict[str, Any]:
    """Attention and KV cache size before and after, by fields of `ConversionReport`."""
    before, after = kv_cache_size(config), kv_cache_size(converted)
    return {
        "attention_before": describe_attention(config.attention),
        "attention_after": describe_attention(converted.attention),
        "cache_bytes_per_token_before": before.own_bytes_per_token(CACHE_DTYPE),
        "cache_bytes_per_token_after": after.own_bytes_per_token(CACHE_DTYPE),
        "cache_bytes_per_token_int8": after.own_bytes_per_token("int8"),
    }


def report_files(report: Mapping[str, Any]) -> dict[str, bytes]:
    """conversion.json, and conversion.svg where matplotlib is installed, by name."""
    files = {REPORT_FILE: report_bytes(report)}
    if report_plot.available():
        files[PLOT_FILE] = report_plot.draw(report)
    return files


def report_bytes(report: Mapping[str, Any]) -> bytes:
    """The content of conversion.json."""
    return (json.dumps(report, indent=2) + "\n").encode()


def describe_attention(attention: ModelAttention) -> str:
    """Kind and dimensions of the attention, e.g. 'GQA, 9 heads in 3 groups of 64'."""
    heads = distinct(attention)[0].num_attention_heads
    if isinstance(attention, MLAConfig | tuple):
        latent, rotary = entry_widths(attention)
        each = " by layer" if isinstance(attention, tuple) else ""
        return f"MLA, {heads} heads, latent {latent} + rotary key {rotary}{each}"
    if not isinstance(attention, GQAConfig):
        return f"{short_name(attention)}, {heads} heads"
    groups, head_dim = attention.num_key_value_heads, attention.head_dim
    if groups == heads:
        return f"MHA, {heads} heads of {head_dim}"
    if groups == 1:
        return f"MQA, {heads} heads sharing one key and value of {head_dim}"
    return f"GQA, {heads} heads in {groups} groups of {head_dim}"


def _describe_experts(moe: MoEConfig | None) -> str | None:
    if moe is None:
        return None
    routed, used, shared = moe.n_routed_experts, moe.num_experts_per_tok, moe.n_shared_experts
    return f"{routed} routed, {used} active per token, {shared} shared"
