"""Compression from start to end: calibration, the division of the budget, a layer's tensors, and
what it cost.

Two passes over the layers, each with one layer in memory: the first measures, the second makes the
new attention and runs both models side by side on text of its own. Statistics and new tensors wait
in a scratch folder. Owns the order of things; the steps are the modules' beside it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lowlat.config.families import LOWLAT
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.convert.budget import (
    STEP,
    Costs,
    LayerCosts,
    Widths,
    even_widths,
    free_widths,
    row_budget,
)
from lowlat.convert.calibration import Calibration
from lowlat.convert.components import Components, split
from lowlat.convert.exact import check_exact
from lowlat.convert.factors import attention_tensors, factorize, rank_costs
from lowlat.convert.layer_run import fast_dtype
from lowlat.convert.recipes import RECIPES, Recipe, best_folded, way_components
from lowlat.convert.rotary import wide_rope
from lowlat.convert.scratch import Scratch
from lowlat.convert.sides import Sides
from lowlat.convert.statistics import (
    AttentionWeights,
    LayerStatistics,
    read_attention,
    run_layers,
)
from lowlat.convert.weights import DerivedWeights, Weights
from lowlat.ops.rope import rotation_magnitude
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

Layout = Literal["standard", "free"]
CANDIDATES = 12
"""Numbers of rotary channels to choose from, evenly spread."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One layer before and after."""

    latent: int
    """Channels of c_t."""
    rotary: int
    """Channels of k_R."""
    predicted: float
    """Predicted squared error of the attention output, relative to the residual stream."""
    measured: float
    """Relative squared deviation of the residual stream behind the layer, all layers before it
    compressed as well.
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
    precision: of products with weights while measuring; the processor's fast one by default. Raises
    UserError for models that are no plain GQA and for shares out of reach.
    """
    source = check_exact(base.config)
    job = _Job(
        base=base,
        source=source,
        budget=row_budget(share, source.row_dim, least=2 * STEP),
        calibration=calibration,
        scratch=Scratch(scratch),
        precision=precision or fast_dtype(),
    )
    way, count = RECIPES[recipe], base.config.num_hidden_layers
    with progress.task("Measuring attention", count, "items") as task:
        measuring = run_layers(base, calibration.windows, job.precision, task)
        for number, statistics in enumerate(measuring):
            _check_measured(number, statistics)
            job.scratch.keep_statistics(number, statistics)
    if way.folded is not None:
        ways = way.folded(source.head_dim, source.num_key_value_heads, job.budget)
        with progress.task("Folding frequencies", len(ways), "items") as task:
            way = best_folded(ways, lambda each: _rotary_only(job, each), task)
    plan = _plan(job, way, layout)
    fitted = calibration.windows if way.refits_output else calibration.windows[:0]
    sides = Sides(base, plan.config, fitted, calibration.held_out, job.precision)
    reports: list[LayerReport] = []
    with progress.task("Compressing", count, "items") as task:
        for number, own in enumerate(plan.widths):
            tensors, measured = sides.advance(number, _layer_tensors(job, plan, number))
            if not math.isfinite(measured):
                raise _overflows(number)
            job.scratch.keep_tensors(number, tensors, dtype)
            predicted = plan.costs[number][own.rotary].of(own.latent)
            reports.append(LayerReport(**asdict(own), predicted=predicted, measured=measured))
            task.advance(1)
        before, after = sides.losses()
    report = CompressionReport(
        recipe=recipe,
        folded=way.fold,
        layout=layout,
        calibration=calibration.origin,
        channels_before=source.row_dim,
        channels_after=sum(w.latent + w.rotary for w in plan.widths) / count,
        perplexity_before=before,
        perplexity_after=after,
        layers=tuple(reports),
    )
    derived = DerivedWeights(
        base, plan.config, job.scratch.read, derives=_is_replaced(source, way), dtype=dtype
    )
    return derived, report


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """What is compressed, and with what."""

    base: Weights
    source: GQAConfig
    budget: int
    """Channels of a row on average."""
    calibration: Calibration
    scratch: Scratch
    precision: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class _Plan:
    """A compression decided on; lists are by layer."""

    way: Recipe
    costs: list[LayerCosts]
    """Predicted; none where the widths were given."""
    widths: list[Widths]
    turning: list[Int64[Tensor, "_"]]
    """Numbers of the components that turn."""
    config: ModelConfig


def _plan(job: _Job, way: Recipe, layout: Layout, widths: list[Widths] | None = None) -> _Plan:
    """What `way` makes of the statistics in the scratch folder, with `widths` or those that cost
    least.
    """
    costs: list[LayerCosts] = []
    priorities: list[Tensor] = []
    frequencies: list[Tensor] = []
    for number in range(job.base.config.num_hidden_layers):
        weights, statistics = read_attention(job.base, number), job.scratch.statistics(number)
        parts = way_components(way, weights, statistics)
        if widths is None:
            costs.append(_layer_costs(way, weights, statistics, parts, job.budget))
        priorities.append(parts.priority / statistics.residual)
        frequencies.append(parts.frequencies)
    widths = widths or _widths(costs, job.budget, layout)
    turning = _turning(priorities, widths, layout)
    turned = [own.flatten()[each] for own, each in zip(frequencies, turning, strict=True)]
    config = compressed_config(job.base, job.source, widths, turned, layout)
    return _Plan(way=way, costs=costs, widths=widths, turning=turning, config=config)


def _rotary_only(job: _Job, way: Recipe) -> float:
    """Held-out perplexity with the rotary channels of `way` and every channel of the latent."""
    assert way.rotary is not None
    row, count = job.source.row_dim, job.base.config.num_hidden_layers
    rotary = way.rotary(job.source.head_dim, job.source.num_key_value_heads, job.budget)
    plan = _plan(job, way, "standard", [Widths(latent=row - rotary, rotary=rotary)] * count)
    held_out = job.calibration.held_out
    sides = Sides(job.base, plan.config, held_out[:0], held_out, job.precision)
    for number in range(count):
        sides.advance(number, _layer_tensors(job, plan, number))
    return sides.losses()[1]


def compressed_config(
    base: Weights,
    source: GQAConfig,
    widths: Sequence[Widths],
    frequencies: Sequence[Float64[Tensor, "_"]],
    layout: Layout,
) -> ModelConfig:
    """`base.config` with MLA of the given widths, k_R turning with `frequencies`; deepseek_v3 in
    the standard layout.
    """
    config = base.config
    attention = [
        MLAConfig(
            num_attention_heads=source.num_attention_heads,
            kv_lora_rank=own.latent,
            q_lora_rank=None,
            qk_nope_head_dim=source.head_dim,
            qk_rope_head_dim=own.rotary,
            v_head_dim=source.head_dim,
            attention_bias=source.qkv_bias,
            q_bias=source.qkv_bias,
            o_bias=source.o_bias,
            kv_a_layernorm=False,
        )
        for own in widths
    ]
    ropes: list[RopeConfig] = []
    for number, own in enumerate(frequencies):
        magnitude = rotation_magnitude(config.rope_of(number))
        context = config.max_position_embeddings
        ropes.append(wide_rope(own.float(), magnitude, 1, context))
    even = layout == "standard"
    return replace(
        config,
        model_type="deepseek_v3" if even else LOWLAT,
        attention=attention[0] if even or len(set(attention)) == 1 else tuple(attention),
        rope=ropes[0] if even or len(set(ropes)) == 1 else tuple(ropes),
        quantization=None,
        packing=None,
        sliding_window=None,
        sliding_window_layers=None,
    )


def _layer_costs(
    way: Recipe,
    weights: AttentionWeights,
    statistics: LayerStatistics,
    parts: Components,
    budget: int,
) -> LayerCosts:
    """For every number of rotary channels worth a thought, relative to the residual stream."""
    groups, head_dim = len(weights.k), weights.k.shape[1]
    if way.rotary is not None:
        candidates = [way.rotary(head_dim, groups, budget)]
    else:
        most = min(groups * head_dim, 2 * budget)
        apart = -(-most // (CANDIDATES * STEP)) * STEP
        candidates = list(range(apart, most + 1, apart))
    found: dict[int, Costs] = {}
    for rotary in candidates:
        turning = _largest(parts.priority, rotary // 2)
        own = split(parts, weights, statistics, turning, keeps_mean=way.keeps_mean)
        latent = rank_costs(way.target(weights, statistics, own))
        still = parts.cost.flatten().sum() - parts.cost.flatten()[turning].sum()
        found[rotary] = Costs(
            still=float(still) / statistics.residual, latent=latent / statistics.residual
        )
    return found


def _widths(costs: Sequence[LayerCosts], budget: int, layout: Layout) -> list[Widths]:
    if layout == "standard":
        return [even_widths(costs, budget)] * len(costs)
    return free_widths(costs, budget)


def _turning(
    priorities: Sequence[Float[Tensor, "pairs components"]],
    widths: Sequence[Widths],
    layout: Layout,
) -> list[Int64[Tensor, "_"]]:
    """Which components turn, by layer. In the standard layout all layers have the same frequencies,
    hence as many components of each.
    """
    if layout == "standard":
        together = torch.stack(list(priorities)).sum(0)
        return [_largest(together, widths[0].rotary // 2)] * len(priorities)
    return [_largest(own, width.rotary // 2) for own, width in zip(priorities, widths, strict=True)]


def _largest(priority: Float[Tensor, "pairs components"], count: int) -> Int64[Tensor, " count"]:
    """Numbers of the components of largest priority, in order of number."""
    return priority.flatten().argsort(descending=True, stable=True)[:count].sort().values


def _check_measured(number: int, statistics: LayerStatistics) -> None:
    """Raises UserError where a layer has no numbers to go by."""
    values = (value for value in asdict(statistics).values() if isinstance(value, Tensor))
    if not (math.isfinite(statistics.residual) and all(v.isfinite().all() for v in values)):
        raise _overflows(number)
    if statistics.residual <= 0:
        raise UserError(f"layer {number}: all that reaches it is 0; such a model has no cache")


def _overflows(number: int) -> UserError:
    return UserError(
        f"layer {number}: numbers that are not finite come out of it on the calibration text; "
        "check the weights, or calibrate on other text"
    )


def _layer_tensors(job: _Job, plan: _Plan, number: int) -> dict[str, Tensor]:
    weights, statistics = read_attention(job.base, number), job.scratch.statistics(number)
    way, source = plan.way, job.source
    parts = way_components(way, weights, statistics)
    halves = split(parts, weights, statistics, plan.turning[number], keeps_mean=way.keeps_mean)
    factors = factorize(way.target(weights, statistics, halves), plan.widths[number].latent)
    tensors = attention_tensors(weights, halves, factors, has_bias=source.qkv_bias)
    if source.qkv_bias and not source.o_bias:
        # attention_bias puts a bias on kv_a_proj_with_mqa and on o_proj, or on neither
        tensors["o_proj.bias"] = torch.zeros(job.base.config.hidden_size, dtype=torch.float64)
    return tensors


def _is_replaced(source: GQAConfig, way: Recipe) -> Callable[[str], bool]:
    """Whether a parameter of the converted model is new: all of the attention, but the output where
    it is not fitted again.
    """
    kept = ["o_proj.weight"] * (not way.refits_output) + ["o_proj.bias"] * source.o_bias

    def is_replaced(name: str) -> bool:
        return ".self_attn." in name and not name.endswith(tuple(kept))

    return is_replaced
