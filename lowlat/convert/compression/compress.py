"""GQA-to-MLA compression: calibration statistics, budget allocation, new attention tensors.

Several passes run the model layer by layer, with one layer in memory. The first measures
statistics, the next ones sensitivities. The last pass computes the new attention and runs both
models on held-out text. Statistics and new tensors are stored in a scratch folder.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowlat.config.model import GQAConfig
from lowlat.convert.compression.budget import (
    STEP,
    EntryWidths,
    PredictedError,
    Sensitivity,
    entry_budget,
)
from lowlat.convert.compression.calibration import Calibration
from lowlat.convert.compression.layer_runner import fast_dtype
from lowlat.convert.compression.methods import METHODS, CompressionMethod, best_fold
from lowlat.convert.compression.paired_run import PairedRun
from lowlat.convert.compression.plan import (
    CacheLayout,
    CompressionInputs,
    CompressionPlan,
    ErrorForecast,
    choose_widths,
    forecast,
    layer_tensors,
    make_plan,
)
from lowlat.convert.compression.scratch import LayerScratch
from lowlat.convert.compression.sensitivity import (
    layer_sensitivities,
    sensitivity_windows,
    single_layer_divergences,
)
from lowlat.convert.compression.statistics import LayerStatistics, run_layers
from lowlat.convert.parameters.exact_mla import check_exact
from lowlat.convert.parameters.weights import DerivedWeights, Weights
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

SENSITIVITY_ROUNDS = 2
"""Measurements of the sensitivities, each at the allocation that results from the previous one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One layer before and after."""

    latent: int
    """Channels of c_t."""
    rotary: int
    """Channels of k_R."""
    predicted_error: float
    """Predicted squared error of the attention output, relative to the residual stream."""
    predicted_divergence: float | None
    """Predicted divergence of next-token distributions from the original's if this layer alone is
    compressed, in nats per token; None if no sensitivity was measured.
    """
    measured_deviation: float
    """Squared deviation of the residual stream after the layer, relative to its square, averaged
    over tokens, with this and all earlier layers compressed.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionReport:
    """Result of a compression; perplexities are of held-out calibration text."""

    method: str
    fold: int = 1
    """Number of neighbouring frequencies that the method treats as one."""
    layout: str
    calibration: str
    """Origin of the calibration text."""
    channels_before: int
    """Channels of a KV cache entry, per token and layer."""
    channels_after: float
    """The same, averaged over layers."""
    perplexity_before: float
    perplexity_after: float
    layers: tuple[LayerReport, ...]


def compress(
    base: Weights,
    calibration: Calibration,
    *,
    share: float,
    method: str,
    layout: CacheLayout,
    scratch: Path,
    dtype: torch.dtype,
    progress: Progress,
    precision: torch.dtype | None = None,
) -> tuple[Weights, CompressionReport]:
    """Compress the GQA model `base` to MLA whose cache entries have `share` of the channels.

    layout: "standard": the same widths and frequencies in all layers; "free": per layer. scratch:
    folder of files that the returned weights read. dtype: of the new tensors. precision: of matrix
    products while measuring (default: the CPU's fastest); sensitivities are measured in fp32.
    Raises UserError for models that are not plain GQA and for shares out of range.
    """
    source = check_exact(base.config)
    inputs = CompressionInputs(
        base=base,
        source=source,
        method=METHODS[method],
        layout=layout,
        budget=entry_budget(share, source.entry_dim, least=2 * STEP),
        calibration=calibration,
        scratch=LayerScratch(scratch),
        precision=precision or fast_dtype(),
    )
    _measure_statistics(inputs, progress)
    inputs = replace(inputs, method=_with_best_fold(inputs, progress))
    chosen, count = inputs.method, base.config.num_hidden_layers
    known, plan = _plan(inputs, progress)
    fit_windows = calibration.windows if chosen.fits_output else calibration.windows[:0]
    pair = PairedRun(base, plan.config, fit_windows, calibration.held_out, inputs.precision)
    layers = _make_layers(inputs, plan, known.errors_of(plan.widths), pair, dtype, progress)
    before, after = pair.perplexities()
    if not (math.isfinite(before) and math.isfinite(after)):
        raise _not_finite("the last norm and the head")
    report = CompressionReport(
        method=method,
        fold=chosen.fold,
        layout=layout,
        calibration=calibration.origin,
        channels_before=source.entry_dim,
        channels_after=sum(w.latent + w.rotary for w in plan.widths) / count,
        perplexity_before=before,
        perplexity_after=after,
        layers=layers,
    )
    derived = DerivedWeights(
        base, plan.config, inputs.scratch.read, derives=_is_replaced(source, chosen), dtype=dtype
    )
    return derived, report


def _measure_statistics(inputs: CompressionInputs, progress: Progress) -> None:
    """Save every layer's statistics."""
    count = inputs.base.config.num_hidden_layers
    with progress.task("Measuring attention", count, "items") as task:
        measuring = run_layers(inputs.base, inputs.calibration.windows, inputs.precision, task)
        for number, statistics in enumerate(measuring):
            _check_statistics(number, statistics)
            inputs.scratch.save_statistics(number, statistics)


def _with_best_fold(inputs: CompressionInputs, progress: Progress) -> CompressionMethod:
    """The method, with the fold of frequencies that suits the model best if it has folds."""
    method, source = inputs.method, inputs.source
    if method.folded is None:
        return method
    variants = method.folded(source.head_dim, source.num_key_value_heads, inputs.budget)
    with progress.task("Folding frequencies", len(variants), "items") as task:
        return best_fold(variants, lambda each: _rotary_only_perplexity(inputs, each), task)


def _plan(inputs: CompressionInputs, progress: Progress) -> tuple[ErrorForecast, CompressionPlan]:
    """Predicted errors of the layers, and the resulting plan."""
    known = forecast(inputs)
    sensitivities: list[Sensitivity] | None = None
    if inputs.allocates_per_layer:
        sensitivities = _measure_sensitivities(inputs, known, progress)
    widths = choose_widths(inputs, known, sensitivities)
    return known, make_plan(inputs, known, widths, sensitivities)


def _measure_sensitivities(
    inputs: CompressionInputs, known: ErrorForecast, progress: Progress
) -> list[Sensitivity] | None:
    """Sensitivities, measured iteratively near the allocation that results from them."""
    windows, entry = sensitivity_windows(inputs.calibration.windows), inputs.source.entry_dim
    passes = 2 * SENSITIVITY_ROUNDS * inputs.base.config.num_hidden_layers
    sensitivities: list[Sensitivity] | None = None
    with progress.task("Measuring sensitivities", passes, "items") as task:
        for _ in range(SENSITIVITY_ROUNDS):
            widths = choose_widths(inputs, known, sensitivities)
            untruncated = [replace(own, latent=entry - own.rotary) for own in widths]
            divergences: list[list[float]] = []
            for each in (widths, untruncated):
                plan = make_plan(inputs, known, each, sensitivities)
                tensors = partial(layer_tensors, inputs, plan)
                divergences.append(
                    single_layer_divergences(inputs.base, plan.config, tensors, windows, task)
                )
            sensitivities = layer_sensitivities(known.errors_of(widths), widths, *divergences)
    return sensitivities


def _make_layers(
    inputs: CompressionInputs,
    plan: CompressionPlan,
    errors: list[PredictedError],
    pair: PairedRun,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[LayerReport, ...]:
    """Save every layer's new tensors and measure its deviation."""
    reports: list[LayerReport] = []
    with progress.task("Compressing", len(plan.widths), "items") as task:
        for number, own in enumerate(plan.widths):
            tensors, deviation = pair.advance(number, layer_tensors(inputs, plan, number))
            if not math.isfinite(deviation):
                raise _not_finite(f"layer {number}")
            inputs.scratch.save_tensors(number, tensors, dtype)
            divergence = None
            if plan.sensitivities is not None:
                divergence = errors[number].total(own.latent, plan.sensitivities[number])
            reports.append(
                LayerReport(
                    **asdict(own),
                    predicted_error=errors[number].total(own.latent),
                    predicted_divergence=divergence,
                    measured_deviation=deviation,
                )
            )
            task.advance(1)
    return tuple(reports)


def _rotary_only_perplexity(inputs: CompressionInputs, method: CompressionMethod) -> float:
    """Held-out perplexity with the rotary channels of `method` and an untruncated latent."""
    assert method.rotary is not None
    entry, count = inputs.source.entry_dim, inputs.base.config.num_hidden_layers
    rotary = method.rotary(inputs.source.head_dim, inputs.source.num_key_value_heads, inputs.budget)
    widths = [EntryWidths(latent=entry - rotary, rotary=rotary)] * count
    inputs = replace(inputs, method=method, layout="standard")
    plan = make_plan(inputs, forecast(inputs, with_errors=False), widths)
    held_out = inputs.calibration.held_out
    pair = PairedRun(inputs.base, plan.config, held_out[:0], held_out, inputs.precision)
    for number in range(count):
        pair.advance(number, layer_tensors(inputs, plan, number))
    return pair.perplexities()[1]


def _check_statistics(number: int, statistics: LayerStatistics) -> None:
    """Raises UserError if a layer's statistics are not finite, or all zero."""
    values = (value for value in asdict(statistics).values() if isinstance(value, Tensor))
    if not (math.isfinite(statistics.residual) and all(v.isfinite().all() for v in values)):
        raise _not_finite(f"layer {number}")
    if statistics.residual <= 0:
        raise UserError(
            f"layer {number}: its residual stream is 0 on the calibration text, so --cache cannot "
            "compress it; check the weights"
        )


def _not_finite(place: str) -> UserError:
    return UserError(
        f"{place}: the output is not finite on the calibration text; check the weights, or give "
        "other text to --calibrate"
    )


def _is_replaced(source: GQAConfig, method: CompressionMethod) -> Callable[[str], bool]:
    """A predicate for new parameters of the converted model: all of the attention, except an output
    projection that is not fitted.
    """
    kept = ("o_proj.weight",) * (not method.fits_output) + ("o_proj.bias",) * source.o_bias
    return lambda name: ".self_attn." in name and not name.endswith(kept)
