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
from safetensors.torch import load_file, save_file
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
from lowlat.convert.components import (
    Components,
    component_frequencies,
    components,
    split,
)
from lowlat.convert.exact import check_exact
from lowlat.convert.factors import attention_tensors, factorize, rank_costs
from lowlat.convert.layer_run import fast_dtype
from lowlat.convert.recipes import RECIPES, Recipe
from lowlat.convert.rotary import wide_rope
from lowlat.convert.sides import Sides
from lowlat.convert.statistics import (
    AttentionWeights,
    LayerStatistics,
    read_attention,
    run_layers,
)
from lowlat.convert.weights import DerivedWeights, Weights
from lowlat.ops.rope import rotation_magnitude
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
    precision = precision or fast_dtype()
    source = check_exact(base.config)
    row = source.row_dim
    budget = row_budget(share, row, least=2 * STEP)
    way = RECIPES[recipe]
    count = base.config.num_hidden_layers
    with progress.task("Measuring attention", count, "items") as task:
        for number, statistics in enumerate(run_layers(base, calibration.windows, precision, task)):
            _save_statistics(_statistics_file(scratch, number), statistics)
    if way.folded is not None:
        ways = way.folded(source.head_dim, source.num_key_value_heads, budget)
        held_out = calibration.held_out
        way = _best_folded(ways, base, source, held_out, budget, scratch, precision, progress)
    costs, priorities = _measured(way, base, budget, scratch)
    widths = _widths(costs, budget, layout)
    chosen = _turning(priorities, widths, layout)
    frequencies = [
        component_frequencies(read_attention(base, number), way.fold, way.stride).flatten()[own]
        for number, own in enumerate(chosen)
    ]
    config = compressed_config(base, source, widths, frequencies, layout)
    fitted = calibration.windows if way.refits_output else calibration.windows[:0]
    sides = Sides(base, config, fitted, calibration.held_out, precision)
    reports: list[LayerReport] = []
    with progress.task("Compressing", count, "items") as task:
        for number, (own, turning) in enumerate(zip(widths, chosen, strict=True)):
            made = _layer_tensors(way, base, number, own, turning, scratch)
            tensors, measured = sides.advance(number, made)
            _save_tensors(_tensor_file(scratch, number), tensors, dtype)
            predicted = costs[number][own.rotary].of(own.latent)
            reports.append(LayerReport(**asdict(own), predicted=predicted, measured=measured))
            task.advance(1)
        before, after = sides.losses()
    report = CompressionReport(
        recipe=recipe,
        folded=way.fold,
        layout=layout,
        calibration=calibration.origin,
        channels_before=row,
        channels_after=sum(w.latent + w.rotary for w in widths) / count,
        perplexity_before=before,
        perplexity_after=after,
        layers=tuple(reports),
    )
    derived = DerivedWeights(
        base, config, _reader(scratch), derives=_is_replaced(source, way), dtype=dtype
    )
    return derived, report


def _best_folded(
    ways: Sequence[Recipe],
    base: Weights,
    source: GQAConfig,
    held_out: Int64[Tensor, "windows length"],
    budget: int,
    scratch: Path,
    precision: torch.dtype,
    progress: Progress,
) -> Recipe:
    """Of `ways`, that with the least perplexity on `held_out` while the latent is whole: what
    folding costs, and what it saves on the components that stand still. Folds grow until one is
    worse than the last, as TransMLA tries them.
    """
    best, least = ways[0], math.inf
    with progress.task("Folding frequencies", len(ways), "items") as task:
        for way in ways:
            found = _rotary_only(way, base, source, held_out, budget, scratch, precision)
            if found >= least:
                break
            best, least = way, found
            task.advance(1)
    return best


def _rotary_only(
    way: Recipe,
    base: Weights,
    source: GQAConfig,
    held_out: Int64[Tensor, "windows length"],
    budget: int,
    scratch: Path,
    precision: torch.dtype,
) -> float:
    """Perplexity with the rotary channels of `way` and every channel of the latent."""
    assert way.rotary is not None
    row, layers = source.row_dim, range(base.config.num_hidden_layers)
    rotary = way.rotary(source.head_dim, source.num_key_value_heads, budget)
    widths = Widths(latent=row - rotary, rotary=rotary)
    turning: list[Tensor] = []
    frequencies: list[Tensor] = []
    for number in layers:
        statistics = _load_statistics(_statistics_file(scratch, number))
        parts = _components(way, read_attention(base, number), statistics)
        turning.append(_largest(parts.priority, rotary // 2))
        frequencies.append(parts.frequencies.flatten()[turning[-1]])
    config = compressed_config(base, source, [widths] * len(layers), frequencies, "free")
    sides = Sides(base, config, held_out[:0], held_out, precision)
    for number in layers:
        sides.advance(number, _layer_tensors(way, base, number, widths, turning[number], scratch))
    return sides.losses()[1]


def _measured(
    way: Recipe, base: Weights, budget: int, scratch: Path
) -> tuple[list[LayerCosts], list[Tensor]]:
    """Of each layer, what widths cost and which components should turn."""
    costs: list[LayerCosts] = []
    priorities: list[Tensor] = []
    for number in range(base.config.num_hidden_layers):
        statistics = _load_statistics(_statistics_file(scratch, number))
        parts = _components(way, read_attention(base, number), statistics)
        costs.append(_layer_costs(way, base, number, statistics, parts, budget))
        priorities.append(parts.priority / statistics.residual)
    return costs, priorities


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


def _components(way: Recipe, weights: AttentionWeights, statistics: LayerStatistics) -> Components:
    return components(
        weights,
        statistics,
        way.basis,
        way.priority,
        keeps_mean=way.keeps_mean,
        stride=way.stride,
    )


def _layer_costs(
    way: Recipe,
    base: Weights,
    number: int,
    statistics: LayerStatistics,
    parts: Components,
    budget: int,
) -> LayerCosts:
    """For every number of rotary channels worth a thought, relative to the residual stream."""
    weights = read_attention(base, number)
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


def _layer_tensors(
    way: Recipe, base: Weights, number: int, own: Widths, turning: Tensor, scratch: Path
) -> dict[str, Tensor]:
    weights = read_attention(base, number)
    source = base.config.attention_of(number)
    assert isinstance(source, GQAConfig)
    statistics = _load_statistics(_statistics_file(scratch, number))
    parts = _components(way, weights, statistics)
    halves = split(parts, weights, statistics, turning, keeps_mean=way.keeps_mean)
    factors = factorize(way.target(weights, statistics, halves), own.latent)
    tensors = attention_tensors(weights, halves, factors, has_bias=source.qkv_bias)
    if source.qkv_bias and not source.o_bias:
        # attention_bias puts a bias on kv_a_proj_with_mqa and on o_proj, or on neither
        tensors["o_proj.bias"] = torch.zeros(base.config.hidden_size, dtype=torch.float64)
    return tensors


def _is_replaced(source: GQAConfig, way: Recipe) -> Callable[[str], bool]:
    """Whether a parameter of the converted model is new: all of the attention, but the output where
    it is not fitted again.
    """
    kept = ["o_proj.weight"] * (not way.refits_output) + ["o_proj.bias"] * source.o_bias

    def is_replaced(name: str) -> bool:
        return ".self_attn." in name and not name.endswith(tuple(kept))

    return is_replaced


def _reader(scratch: Path) -> Callable[[str], Tensor]:
    held: dict[int, dict[str, Tensor]] = {}

    def read(name: str) -> Tensor:
        _, number, _, below = name.split(".", 3)
        if int(number) not in held:
            held.clear()
            held[int(number)] = load_file(_tensor_file(scratch, int(number)))
        return held[int(number)][below]

    return read


def _statistics_file(scratch: Path, number: int) -> Path:
    return scratch / f"statistics-{number}.safetensors"


def _tensor_file(scratch: Path, number: int) -> Path:
    return scratch / f"layer-{number}.safetensors"


def _save_tensors(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)


def _save_statistics(path: Path, statistics: LayerStatistics) -> None:
    values = asdict(statistics)
    residual = torch.tensor(values.pop("residual"), dtype=torch.float64)
    rotation = torch.view_as_real(values.pop("rotation")).contiguous()
    save_file(values | {"residual": residual, "rotation": rotation}, path)


def _load_statistics(path: Path) -> LayerStatistics:
    values = load_file(path)
    residual = float(values.pop("residual"))
    # a tensor in a file may lie at a multiple of 8 bytes, which is none of a complex number's 16
    rotation = torch.view_as_complex(values.pop("rotation").clone())
    return LayerStatistics(**values, residual=residual, rotation=rotation)
