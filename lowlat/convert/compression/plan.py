"""Compression plan: widths and RoPE components of every layer, the new config, and new tensors.

Statistics come from a scratch folder; sensitivities are measured in `compression.sensitivity`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lowlat.config.hf.families import LOWLAT
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.convert.compression.budget import (
    STEP,
    EntryWidths,
    ErrorsByRotary,
    PredictedError,
    Sensitivity,
    per_layer_widths,
    uniform_widths,
)
from lowlat.convert.compression.calibration import Calibration
from lowlat.convert.compression.components import Components, decouple
from lowlat.convert.compression.low_rank import attention_tensors, factorize, rank_errors
from lowlat.convert.compression.methods import CompressionMethod
from lowlat.convert.compression.scratch import LayerScratch
from lowlat.convert.compression.sensitivity import shrunk
from lowlat.convert.compression.statistics import AttentionWeights, LayerStatistics, read_attention
from lowlat.convert.parameters.exact_mla import mla_attention_config
from lowlat.convert.parameters.shared_rope import wide_rope
from lowlat.convert.parameters.weights import Weights
from lowlat.ops.rope import rotation_magnitude

CacheLayout = Literal["standard", "free"]
CANDIDATES = 24
"""Number of rotary widths to choose from, evenly spread."""
HEAD_STEP, WIDEST_HEAD = 32, 256
"""Key head widths that vLLM's CPU kernels support: multiples of HEAD_STEP up to WIDEST_HEAD."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionInputs:
    """The model to compress, its calibration text, method and budget."""

    base: Weights
    source: GQAConfig
    method: CompressionMethod
    layout: CacheLayout
    budget: int
    """Channels of a cache entry, on average over layers."""
    calibration: Calibration
    scratch: LayerScratch
    precision: torch.dtype
    """Dtype of matrix products while measuring."""

    @property
    def allocates_per_layer(self) -> bool:
        """Whether measured sensitivities allocate the widths per layer."""
        return self.layout == "free" and self.method.allocates_by_sensitivity


@dataclass(frozen=True, kw_only=True, slots=True)
class ErrorForecast:
    """A method's predictions; lists are by layer."""

    errors: list[ErrorsByRotary]
    """Predicted errors, relative to the residual stream."""
    priorities: list[Float64[Tensor, "pairs components"]]
    """Priority of each component to keep its rotation."""
    frequencies: list[Float64[Tensor, "pairs components"]]

    def errors_of(self, widths: Sequence[EntryWidths]) -> list[PredictedError]:
        """The predicted errors of layers with the rotary channels of `widths`."""
        return [errors[own.rotary] for errors, own in zip(self.errors, widths, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionPlan:
    """The decisions of a compression; lists are by layer."""

    widths: list[EntryWidths]
    rope: list[Int64[Tensor, "_"]]
    """Indices of the RoPE components."""
    config: ModelConfig
    sensitivities: Sequence[Sensitivity] | None
    """Sensitivities in nats of divergence; None if not measured."""


def forecast(inputs: CompressionInputs, *, with_errors: bool = True) -> ErrorForecast:
    """Predict errors from the statistics in the scratch folder. with_errors: False leaves `errors`
    empty.
    """
    found = ErrorForecast(errors=[], priorities=[], frequencies=[])
    for number in range(inputs.base.config.num_hidden_layers):
        weights, statistics = read_attention(inputs.base, number), inputs.scratch.statistics(number)
        parts = inputs.method.components(weights, statistics)
        if with_errors:
            found.errors.append(_layer_errors(inputs, weights, statistics, parts))
        found.priorities.append(parts.priority)
        found.frequencies.append(parts.frequencies)
    return found


def choose_widths(
    inputs: CompressionInputs, known: ErrorForecast, sensitivities: Sequence[Sensitivity] | None
) -> list[EntryWidths]:
    """Widths of least predicted error under the budget; if allocated per layer, errors are weighted
    by each layer's sensitivity.
    """
    if not inputs.allocates_per_layer:
        return [uniform_widths(known.errors, inputs.budget)] * len(known.errors)
    weights = None if sensitivities is None else shrunk(sensitivities)
    return per_layer_widths(known.errors, inputs.budget, weights)


def make_plan(
    inputs: CompressionInputs,
    known: ErrorForecast,
    widths: list[EntryWidths],
    sensitivities: Sequence[Sensitivity] | None = None,
) -> CompressionPlan:
    """The plan with `widths`, which `sensitivities` determined."""
    rope = _rope_components(known.priorities, widths, inputs.layout)
    frequencies = [own.flatten()[each] for own, each in zip(known.frequencies, rope, strict=True)]
    config = compressed_config(
        inputs.base.config, inputs.source, widths, frequencies, inputs.layout
    )
    return CompressionPlan(widths=widths, rope=rope, config=config, sensitivities=sensitivities)


def compressed_config(
    config: ModelConfig,
    source: GQAConfig,
    widths: Sequence[EntryWidths],
    frequencies: Sequence[Float64[Tensor, "_"]],
    layout: CacheLayout,
) -> ModelConfig:
    """`config` with MLA of the given widths, whose k_R rotates with `frequencies`. The standard
    layout is a deepseek_v3 with key heads padded to widths that other programs support.
    """
    is_standard = layout == "standard"
    attention = [
        mla_attention_config(
            source,
            latent=own.latent,
            nope=source.head_dim + (_padding(source.head_dim + own.rotary) if is_standard else 0),
            rope=own.rotary,
        )
        for own in widths
    ]
    ropes: list[RopeConfig] = []
    for number, own in enumerate(frequencies):
        magnitude = rotation_magnitude(config.rope_of(number))
        context = config.max_position_embeddings
        ropes.append(wide_rope(own.float(), magnitude, 1, context))
    return replace(
        config,
        model_type="deepseek_v3" if is_standard else LOWLAT,
        attention=attention[0] if is_standard or len(set(attention)) == 1 else tuple(attention),
        rope=ropes[0] if is_standard or len(set(ropes)) == 1 else tuple(ropes),
        quantization=None,
        packing=None,
        sliding_window=None,
        sliding_window_layers=None,
    )


def estimated_config(
    config: ModelConfig, source: GQAConfig, share: float, layout: CacheLayout
) -> ModelConfig:
    """Approximate result of compressing `config` to `share` of its cache, before anything is
    measured: a quarter of the cache entry is rotary.
    """
    entry = round(share * source.entry_dim / STEP)
    rotary = max(1, entry // 4)
    widths = EntryWidths(latent=(entry - rotary) * STEP, rotary=rotary * STEP)
    layers = config.num_hidden_layers
    frequencies = torch.ones(widths.rotary // 2, dtype=torch.float64)
    return compressed_config(config, source, [widths] * layers, [frequencies] * layers, layout)


def _padding(head: int) -> int:
    """Zero channels that pad a key head to a width that other programs support."""
    padding = -head % HEAD_STEP
    return padding if head + padding <= WIDEST_HEAD else 0


def _layer_errors(
    inputs: CompressionInputs,
    weights: AttentionWeights,
    statistics: LayerStatistics,
    parts: Components,
) -> ErrorsByRotary:
    """Predicted errors, relative to the residual stream, for every candidate rotary width."""
    groups, head_dim = len(weights.k), weights.k.shape[1]
    method, budget = inputs.method, inputs.budget
    if method.rotary is not None:
        candidates = [method.rotary(head_dim, groups, budget)]
    else:
        most = min(groups * head_dim, 2 * budget)
        step = -(-most // (CANDIDATES * STEP)) * STEP
        candidates = list(range(step, most + 1, step))
    found: dict[int, PredictedError] = {}
    for rotary in candidates:
        rope = _largest(parts.priority, rotary // 2)
        keys = decouple(parts, weights, statistics, rope)
        latent = rank_errors(method.target(weights, statistics, keys))
        nope = parts.nope_error.flatten().sum() - parts.nope_error.flatten()[rope].sum()
        found[rotary] = PredictedError(
            nope=float(nope) / statistics.residual, latent=latent / statistics.residual
        )
    return found


def _rope_components(
    priorities: Sequence[Float[Tensor, "pairs components"]],
    widths: Sequence[EntryWidths],
    layout: CacheLayout,
) -> list[Int64[Tensor, "_"]]:
    """Indices of the RoPE components, by layer. In the standard layout all layers have the same
    frequencies, hence the same number of components at each frequency.
    """
    if layout == "standard":
        together = torch.stack(list(priorities)).sum(0)
        return [_largest(together, widths[0].rotary // 2)] * len(priorities)
    return [_largest(own, width.rotary // 2) for own, width in zip(priorities, widths, strict=True)]


def _largest(priority: Float[Tensor, "pairs components"], count: int) -> Int64[Tensor, " count"]:
    """Indices of the components of largest priority, in ascending order."""
    return priority.flatten().argsort(descending=True, stable=True)[:count].sort().values


def layer_tensors(
    inputs: CompressionInputs, plan: CompressionPlan, number: int
) -> dict[str, Tensor]:
    """The new attention of layer `number` in fp64, by names in it, without W_O."""
    weights, statistics = read_attention(inputs.base, number), inputs.scratch.statistics(number)
    method, source = inputs.method, inputs.source
    parts = method.components(weights, statistics)
    keys = decouple(parts, weights, statistics, plan.rope[number])
    factors = factorize(method.target(weights, statistics, keys), plan.widths[number].latent)
    attention = plan.config.attention_of(number)
    assert isinstance(attention, MLAConfig)
    tensors = attention_tensors(
        weights,
        keys,
        factors,
        padding=attention.qk_nope_head_dim - source.head_dim,
        has_bias=source.qkv_bias,
    )
    if source.qkv_bias and not source.o_bias:
        # attention_bias puts a bias on kv_a_proj_with_mqa and on o_proj, or on neither
        tensors["o_proj.bias"] = torch.zeros(inputs.base.config.hidden_size, dtype=torch.float64)
    return tensors
