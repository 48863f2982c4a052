"""What a compression decides: widths of every layer, which components turn, the new config, and a
layer's new tensors once that is settled.

Statistics come from a scratch folder; what a layer's error is worth is measured elsewhere
(`convert.prices`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from lowlat.config.hf.families import LOWLAT
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from lowlat.convert.budget import STEP, Costs, LayerCosts, Price, Widths, even_widths, free_widths
from lowlat.convert.calibration import Calibration
from lowlat.convert.components import Components, split
from lowlat.convert.factors import attention_tensors, factorize, rank_costs
from lowlat.convert.prices import trusted
from lowlat.convert.recipes import Recipe, way_components
from lowlat.convert.rotary import wide_rope
from lowlat.convert.scratch import Scratch
from lowlat.convert.statistics import AttentionWeights, LayerStatistics, read_attention
from lowlat.convert.weights import Weights
from lowlat.ops.rope import rotation_magnitude

Layout = Literal["standard", "free"]
CANDIDATES = 24
"""Numbers of rotary channels to choose from, evenly spread."""
HEAD_STEP, WIDEST_HEAD = 32, 256
"""Key heads that vLLM's kernels for CPUs take: multiples of so many channels, up to the widest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is compressed, and with what."""

    base: Weights
    source: GQAConfig
    budget: int
    """Channels of a row on average."""
    calibration: Calibration
    scratch: Scratch
    precision: torch.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """What a recipe knows of every layer before anything is decided; lists are by layer."""

    costs: list[LayerCosts]
    """Relative to the residual stream."""
    priorities: list[Float64[Tensor, "pairs components"]]
    """Of turning."""
    frequencies: list[Float64[Tensor, "pairs components"]]

    def costs_of(self, widths: Sequence[Widths]) -> list[Costs]:
        """What layers with the rotary channels of `widths` cost."""
        return [costs[own.rotary] for costs, own in zip(self.costs, widths, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A compression decided on; lists are by layer."""

    way: Recipe
    widths: list[Widths]
    turning: list[Int64[Tensor, "_"]]
    """Numbers of the components that turn."""
    config: ModelConfig
    prices: Sequence[Price] | None
    """In nats of divergence; None where they were not measured."""


def forecast(job: Job, way: Recipe, *, with_costs: bool = True) -> Forecast:
    """What `way` makes of the statistics in the scratch folder; `costs` is empty unless wanted."""
    found = Forecast(costs=[], priorities=[], frequencies=[])
    for number in range(job.base.config.num_hidden_layers):
        weights, statistics = read_attention(job.base, number), job.scratch.statistics(number)
        parts = way_components(way, weights, statistics)
        if with_costs:
            found.costs.append(_layer_costs(way, weights, statistics, parts, job.budget))
        found.priorities.append(parts.priority)
        found.frequencies.append(parts.frequencies)
    return found


def cheapest_widths(
    job: Job, layout: Layout, known: Forecast, prices: Sequence[Price] | None
) -> list[Widths]:
    """Widths that cost least under the budget; in the free layout each layer's predicted costs at
    its price.
    """
    if layout == "standard":
        return [even_widths(known.costs, job.budget)] * len(known.costs)
    return free_widths(known.costs, job.budget, None if prices is None else trusted(prices))


def make_plan(
    job: Job,
    way: Recipe,
    layout: Layout,
    known: Forecast,
    widths: list[Widths],
    prices: Sequence[Price] | None = None,
) -> Plan:
    """The compression with `widths`, which were found at `prices`."""
    turning = _turning(known.priorities, widths, layout)
    turned = [own.flatten()[each] for own, each in zip(known.frequencies, turning, strict=True)]
    config = compressed_config(job.base.config, job.source, widths, turned, layout)
    return Plan(way=way, widths=widths, turning=turning, config=config, prices=prices)


def compressed_config(
    config: ModelConfig,
    source: GQAConfig,
    widths: Sequence[Widths],
    frequencies: Sequence[Float64[Tensor, "_"]],
    layout: Layout,
) -> ModelConfig:
    """`config` with MLA of the given widths, k_R turning with `frequencies`; in the standard layout
    deepseek_v3, its key heads padded to what other programs take.
    """
    even = layout == "standard"
    attention = [
        MLAConfig(
            num_attention_heads=source.num_attention_heads,
            kv_lora_rank=own.latent,
            q_lora_rank=None,
            qk_nope_head_dim=source.head_dim
            + (_padding(source.head_dim + own.rotary) if even else 0),
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


def likely_config(
    config: ModelConfig, source: GQAConfig, share: float, layout: Layout
) -> ModelConfig:
    """About what a compression of `config` to `share` of its cache leads to, before anything is
    measured: a quarter of a row turns.
    """
    row = round(share * source.entry_dim / STEP)
    rotary = max(1, row // 4)
    widths = Widths(latent=(row - rotary) * STEP, rotary=rotary * STEP)
    layers = config.num_hidden_layers
    frequencies = torch.ones(widths.rotary // 2, dtype=torch.float64)
    return compressed_config(config, source, [widths] * layers, [frequencies] * layers, layout)


def _padding(head: int) -> int:
    """Channels of zeros that make a key head of `head` channels one that other programs take."""
    padding = -head % HEAD_STEP
    return padding if head + padding <= WIDEST_HEAD else 0


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


def layer_tensors(job: Job, plan: Plan, number: int) -> dict[str, Tensor]:
    """The new attention of layer `number` in fp64, by names in it, without W_O."""
    weights, statistics = read_attention(job.base, number), job.scratch.statistics(number)
    way, source = plan.way, job.source
    parts = way_components(way, weights, statistics)
    halves = split(parts, weights, statistics, plan.turning[number], keeps_mean=way.keeps_mean)
    factors = factorize(way.target(weights, statistics, halves), plan.widths[number].latent)
    attention = plan.config.attention_of(number)
    assert isinstance(attention, MLAConfig)
    tensors = attention_tensors(
        weights,
        halves,
        factors,
        padding=attention.qk_nope_head_dim - source.head_dim,
        has_bias=source.qkv_bias,
    )
    if source.qkv_bias and not source.o_bias:
        # attention_bias puts a bias on kv_a_proj_with_mqa and on o_proj, or on neither
        tensors["o_proj.bias"] = torch.zeros(job.base.config.hidden_size, dtype=torch.float64)
    return tensors
