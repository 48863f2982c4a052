"""Compression from start to end: calibration, the division of the budget, a layer's tensors, and
what it cost.

Passes over the layers, each with one layer in memory: the first measures, some weigh what errors of
single layers do, the last makes the new attention and runs both models side by side on text of its
own. Statistics and new tensors wait in a scratch folder. Owns the order of things; the steps are
the modules' beside it.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lowlat.config.model import GQAConfig
from lowlat.convert.budget import STEP, Costs, Price, Widths, row_budget
from lowlat.convert.calibration import Calibration
from lowlat.convert.exact import check_exact
from lowlat.convert.layer_run import fast_dtype
from lowlat.convert.planning import (
    Forecast,
    Job,
    Layout,
    Plan,
    cheapest_widths,
    forecast,
    layer_tensors,
    make_plan,
)
from lowlat.convert.prices import layer_prices, lone_divergences, priced_on
from lowlat.convert.recipes import RECIPES, Recipe, best_folded
from lowlat.convert.scratch import Scratch
from lowlat.convert.sides import Sides
from lowlat.convert.statistics import LayerStatistics, run_layers
from lowlat.convert.weights import DerivedWeights, Weights
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

PRICINGS = 2
"""Divisions of the budget by prices that were measured at the division before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One layer before and after."""

    latent: int
    """Channels of c_t."""
    rotary: int
    """Channels of k_R."""
    predicted: float
    """Predicted squared error of the attention output, relative to the residual stream."""
    alone: float | None
    """By how much, as far as predicted, next-token distributions diverge from the original's where
    this layer alone is compressed: nats per token. None where it was not measured.
    """
    measured: float
    """Squared deviation of the residual stream behind the layer relative to its square, on average
    over tokens, all layers before it compressed as well.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressionReport:
    """What a compression did, measured on text that no statistic was taken of."""

    recipe: str
    folded: int = 1
    """Neighbouring frequencies that the recipe took for one."""
    layout: str
    calibration: str
    """Where the text comes from."""
    channels_before: int
    """Of a cache row, per token and layer."""
    channels_after: float
    """The same, on average over layers."""
    perplexity_before: float
    perplexity_after: float
    layers: tuple[LayerReport, ...]


def compress(
    base: Weights,
    calibration: Calibration,
    *,
    share: float,
    recipe: str,
    layout: Layout,
    scratch: Path,
    dtype: torch.dtype,
    progress: Progress,
    precision: torch.dtype | None = None,
) -> tuple[Weights, CompressionReport]:
    """The GQA model `base` as MLA whose cache rows have `share` of the channels, and what it cost.

    layout: standard gives every layer the same widths and frequencies, free its own. `scratch` is a
    folder for files that the result reads as long as it is used. dtype: of the new tensors.
    precision: of products with weights while measuring, the processor's fast one by default; layers
    are weighed in fp32. Raises UserError for models that are no plain GQA and for shares out of
    reach.
    """
    source = check_exact(base.config)
    job = Job(
        base=base,
        source=source,
        budget=row_budget(share, source.entry_dim, least=2 * STEP),
        calibration=calibration,
        scratch=Scratch(scratch),
        precision=precision or fast_dtype(),
    )
    way, count = RECIPES[recipe], base.config.num_hidden_layers
    _measure(job, progress)
    if way.folded is not None:
        ways = way.folded(source.head_dim, source.num_key_value_heads, job.budget)
        with progress.task("Folding frequencies", len(ways), "items") as task:
            way = best_folded(ways, lambda each: _rotary_only(job, each), task)
    known, plan = _planned(job, way, layout, progress)
    fitted = calibration.windows if way.refits_output else calibration.windows[:0]
    sides = Sides(base, plan.config, fitted, calibration.held_out, job.precision)
    layers = _make_layers(job, plan, known.costs_of(plan.widths), sides, dtype, progress)
    before, after = sides.losses()
    if not (math.isfinite(before) and math.isfinite(after)):
        raise _overflows("the last norm and the head")
    report = CompressionReport(
        recipe=recipe,
        folded=way.fold,
        layout=layout,
        calibration=calibration.origin,
        channels_before=source.entry_dim,
        channels_after=sum(w.latent + w.rotary for w in plan.widths) / count,
        perplexity_before=before,
        perplexity_after=after,
        layers=layers,
    )
    derived = DerivedWeights(
        base, plan.config, job.scratch.read, derives=_is_replaced(source, way), dtype=dtype
    )
    return derived, report


def _measure(job: Job, progress: Progress) -> None:
    """Keep every layer's statistics."""
    count = job.base.config.num_hidden_layers
    with progress.task("Measuring attention", count, "items") as task:
        measuring = run_layers(job.base, job.calibration.windows, job.precision, task)
        for number, statistics in enumerate(measuring):
            _check_measured(number, statistics)
            job.scratch.keep_statistics(number, statistics)


def _make_layers(
    job: Job,
    plan: Plan,
    costs: list[Costs],
    sides: Sides,
    dtype: torch.dtype,
    progress: Progress,
) -> tuple[LayerReport, ...]:
    """Keep every layer's new tensors; what each cost."""
    reports: list[LayerReport] = []
    with progress.task("Compressing", len(plan.widths), "items") as task:
        for number, own in enumerate(plan.widths):
            tensors, measured = sides.advance(number, layer_tensors(job, plan, number))
            if not math.isfinite(measured):
                raise _overflows(f"layer {number}")
            job.scratch.keep_tensors(number, tensors, dtype)
            price = None if plan.prices is None else plan.prices[number]
            reports.append(
                LayerReport(
                    **asdict(own),
                    predicted=costs[number].of(own.latent),
                    alone=None if price is None else costs[number].of(own.latent, price),
                    measured=measured,
                )
            )
            task.advance(1)
    return tuple(reports)


def _planned(job: Job, way: Recipe, layout: Layout, progress: Progress) -> tuple[Forecast, Plan]:
    """What is known of the layers, and the division of the budget that follows."""
    known = forecast(job, way)
    prices: list[Price] | None = None
    divided: Layout = layout if way.divides_budget else "standard"
    if divided == "free":
        prices = _prices(job, way, known, progress)
    widths = cheapest_widths(job, divided, known, prices)
    return known, make_plan(job, way, layout, known, widths, prices)


def _prices(job: Job, way: Recipe, known: Forecast, progress: Progress) -> list[Price] | None:
    """What errors of the layers cost near the division that these prices lead to."""
    windows, row = priced_on(job.calibration.windows), job.source.entry_dim
    passes = 2 * PRICINGS * job.base.config.num_hidden_layers
    prices: list[Price] | None = None
    with progress.task("Weighing layers", passes, "items") as task:
        for _ in range(PRICINGS):
            widths = cheapest_widths(job, "free", known, prices)
            whole = [replace(own, latent=row - own.rotary) for own in widths]
            both: list[list[float]] = []
            for each in (widths, whole):
                plan = make_plan(job, way, "free", known, each, prices)
                tensors = partial(layer_tensors, job, plan)
                both.append(lone_divergences(job.base, plan.config, tensors, windows, task))
            prices = layer_prices(known.costs_of(widths), widths, *both)
    return prices


def _rotary_only(job: Job, way: Recipe) -> float:
    """Held-out perplexity with the rotary channels of `way` and every channel of the latent."""
    assert way.rotary is not None
    row, count = job.source.entry_dim, job.base.config.num_hidden_layers
    rotary = way.rotary(job.source.head_dim, job.source.num_key_value_heads, job.budget)
    widths = [Widths(latent=row - rotary, rotary=rotary)] * count
    known = forecast(job, way, with_costs=False)
    plan = make_plan(job, way, "standard", known, widths)
    held_out = job.calibration.held_out
    sides = Sides(job.base, plan.config, held_out[:0], held_out, job.precision)
    for number in range(count):
        sides.advance(number, layer_tensors(job, plan, number))
    return sides.losses()[1]


def _check_measured(number: int, statistics: LayerStatistics) -> None:
    """Raises UserError where a layer has no numbers to go by."""
    values = (value for value in asdict(statistics).values() if isinstance(value, Tensor))
    if not (math.isfinite(statistics.residual) and all(v.isfinite().all() for v in values)):
        raise _overflows(f"layer {number}")
    if statistics.residual <= 0:
        raise UserError(f"layer {number}: all that reaches it is 0; such a model has no cache")


def _overflows(place: str) -> UserError:
    return UserError(
        f"{place}: numbers that are not finite come out of it on the calibration text; check the "
        "weights, or calibrate on other text"
    )


def _is_replaced(source: GQAConfig, way: Recipe) -> Callable[[str], bool]:
    """Whether a parameter of the converted model is new: all of the attention, but the output where
    it is not fitted again.
    """
    kept = ["o_proj.weight"] * (not way.refits_output) + ["o_proj.bias"] * source.o_bias

    def is_replaced(name: str) -> bool:
        return ".self_attn." in name and not name.endswith(tuple(kept))

    return is_replaced
