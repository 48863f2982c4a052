"""Expert parallelism load balancer (EPLB) while serving: every `step_interval` steps it places the
replicas of loaded experts again, by the tokens that every expert has had since the last time.

All processes of a stage see the routing of all tokens, so that each computes the same placement by
itself. Tokens do not change: an expert's output is the same wherever it is computed, and outputs
are added in the order of the experts' numbers.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lowlat.model.block import DecoderLayer
from lowlat.model.moe import Experts, MoE
from lowlat.model.native import NativeModel
from lowlat.model.share import RemoteModule, place_experts
from lowlat.model.transformer import Transformer
from lowlat.ops.expert_placement import imbalance

logger = logging.getLogger(__name__)

ExpertLoader = Callable[[Mapping[int, set[int]]], Mapping[int, Mapping[int, nn.Module]]]
"""Reads experts from the checkpoint: numbers by layer -> the modules by layer and number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBalancing:
    """When experts are placed again, and how their weights are read."""

    step_interval: int
    """Steps between two placements."""
    load: ExpertLoader


class ExpertBalancer:
    """Places the routed experts of one process's decoder layers."""

    def __init__(self, model: Transformer, native: NativeModel, balancing: ExpertBalancing) -> None:
        self._model, self._native, self._balancing = model, native, balancing
        native.count_expert_loads()
        self._before: dict[int, Tensor] = {}
        """Counts at the last placement."""
        self._steps = 0
        self.num_placements = self.num_moved = 0
        """Times that experts were placed again, and experts that this process has read for it."""

    def is_due(self) -> bool:
        """Whether to place experts before the next step; called once per step by process 0."""
        self._steps += 1
        return self._steps % self._balancing.step_interval == 0

    def rebalance(self) -> None:
        """Place the experts by their loads since the last time; reads those that are new here."""
        counts = {n: torch.tensor(row) for n, row in self._native.expert_loads().items()}
        if not counts:
            return
        layers = {layer: self._moe(layer) for layer in counts}
        loads = torch.stack([counts[n] - self._before.get(n, 0) for n in counts])
        self._before = counts
        moe = self._model.config.moe
        assert moe is not None
        placed = place_experts(loads, self._model.share, groups=moe.n_group)
        experts = [experts_of(mlp) for mlp in layers.values()]
        before = [own.places for own in experts]
        for own, places in zip(experts, placed, strict=True):
            own.places = places
        self._replace(layers)
        self.num_placements += 1
        parts = self._model.share.experts
        old, new = (_imbalance(loads, places, parts) for places in (before, placed))
        logger.info("experts placed again: busiest process over the mean %.2f, was %.2f", new, old)

    def _replace(self, layers: Mapping[int, MoE]) -> None:
        """Hold the experts of this process's places, and no others."""
        held = {layer: experts_of(mlp) for layer, mlp in layers.items()}
        missing = {
            layer: {n for n in experts.own if isinstance(experts[n], RemoteModule)}
            for layer, experts in held.items()
        }
        self.num_moved += sum(map(len, missing.values()))
        found = self._balancing.load(missing)
        for layer, mlp in layers.items():
            experts = held[layer]
            for number, module in found.get(layer, {}).items():
                experts[number] = module
            for number in set(range(len(experts))).difference(experts.own):
                experts[number] = RemoteModule()
            self._native.place_experts(layer, mlp)

    def _moe(self, layer: int) -> MoE:
        block = self._model.layers[layer]
        assert isinstance(block, DecoderLayer) and isinstance(block.mlp, MoE)
        return block.mlp


def experts_of(mlp: MoE) -> Experts:
    """The routed experts of a layer, which no training replaces."""
    assert isinstance(mlp.experts, Experts)
    return mlp.experts


def _imbalance(loads: Int[Tensor, "layers experts"], places: list[list[int]], parts: int) -> float:
    return float(imbalance(loads.double(), torch.tensor(places), parts).mean())
