"""Pipeline stages for serving: division of a model's layers among processes by their weights."""

from dataclasses import replace
from itertools import pairwise

from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import (
    attention_parameters,
    mlp_parameters,
    moe_parameters,
    mtp_parameters,
)
from lowlat.config.serving_layout import ServingLayout
from lowlat.model.share import ModelShare
from lowlat.plan.stages import balanced
from lowlat.utils.errors import UserError


def share_of(config: ModelConfig, layout: ServingLayout, rank: int) -> ModelShare:
    """The share of process `rank`. Raises UserError if `layout` does not divide the model."""
    stage, own = divmod(rank, layout.stage_size)
    share = serving_stages(config, layout.pipeline)[stage]
    if layout.stage_size == 1:
        return share
    experts = 0 if config.moe is None else config.moe.n_routed_experts
    if layout.expert > 1 and not experts:
        raise UserError(f"--parallel {layout}: the model has no routed experts; leave out expert")
    if experts % layout.stage_size:
        raise UserError(
            f"--parallel {layout}: {layout.stage_size} processes do not divide the model's "
            f"{experts} routed experts"
        )
    return replace(
        share,
        tensor=layout.tensor,
        tensor_rank=own % layout.tensor,
        experts=layout.stage_size if experts else 1,
        expert_rank=own if experts else 0,
    )


def serving_stages(config: ModelConfig, count: int) -> list[ModelShare]:
    """The stages in order, so that the largest has as few parameters as possible; the last one has
    the head and the MTP modules. Raises UserError for more stages than can be divided."""
    units = _units(config)
    if count > len(units):
        raise UserError(
            f"pipeline={count}: the model's layers divide into at most {len(units)} stages; give "
            "fewer"
        )
    costs = [float(sum(_parameters(config, layer) for layer in unit)) for unit in units]
    costs[-1] += config.vocab_size * config.hidden_size
    depths = range(config.num_hidden_layers, config.num_cache_layers)
    costs[-1] += sum(mtp_parameters(config, layer) for layer in depths)
    ends = balanced(tuple(costs), count, len(costs))
    return [
        ModelShare(
            layers=range(units[first].start, units[last - 1].stop),
            is_first=first == 0,
            is_last=last == len(units),
        )
        for first, last in pairwise((0, *ends))
    ]


def _units(config: ModelConfig) -> list[range]:
    """Runs of layers that stay in one process: a layer that attends to the tokens that another one
    chose (sparse attention) follows it."""
    starts = [n for n in range(config.num_hidden_layers) if config.choosing_layer(n) in (None, n)]
    return [range(first, last) for first, last in pairwise((*starts, config.num_hidden_layers))]


def _parameters(config: ModelConfig, layer: int) -> int:
    own = attention_parameters(config, layer)
    if config.moe is not None and config.is_moe_layer(layer):
        return own + moe_parameters(config, config.moe)
    return own + mlp_parameters(config, config.intermediate_size)
