"""Find weights of B in other tensors of A: exchanged experts, gate and up, copies of layers."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lowlat.compare.weights.checkpoint import CheckpointWeights, wide
from lowlat.compare.weights.finding import Explanation, moved
from lowlat.compare.weights.scan import scan

SKETCHED = 256
"""Leading values that stand for a weight in the search."""
NEAREST = 3
"""Weights of A that are compared in full."""

_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(\w+)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class WeightIndex:
    """Leading values of all weights of a checkpoint, by shape; read when first searched."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self.weights = weights
        self._names: dict[tuple[int, ...], list[str]] = defaultdict(list)
        self._sketches: dict[tuple[int, ...], Tensor] = {}
        for name, shape in weights.shapes.items():
            self._names[shape].append(name)

    def find(self, b: CheckpointWeights, name: str, limit: float) -> str | None:
        """The weight of this checkpoint that equals the weight `name` of `b` within `limit`.

        Among several, one in the same place of another layer.
        """
        shape = b.shapes[name]
        others = self._names.get(shape, [])
        if len(others) < 2:
            return None
        if shape not in self._sketches:
            self._sketches[shape] = torch.stack([_sketch(self.weights, each) for each in others])
        own = _sketch(b, name)
        errors = (self._sketches[shape] - own).norm(dim=1) / own.norm().clamp_min(1e-30)
        near = [others[n] for n in errors.argsort(stable=True).tolist() if errors[n] <= 2 * limit]
        suffix = name.rpartition(".layers.")[2].partition(".")[2]
        near.sort(key=lambda other: not other.endswith(suffix))
        candidates = [other for other in near if other != name][:NEAREST]
        return next(
            (n for n in candidates if scan(self.weights, b, name, n).relative <= limit), None
        )


def _sketch(weights: CheckpointWeights, name: str) -> Tensor:
    shape = weights.shapes[name]
    rows = min(shape[0], -(-SKETCHED // max(math.prod(shape[1:]), 1)))
    return wide(weights.rows(name, 0, rows)).float().flatten()[:SKETCHED]


class Move(NamedTuple):
    """Weights of B that are elsewhere in A."""

    explanation: Explanation
    place: str
    """The module or tensor."""
    names: list[str]
    """The weights."""


def explain_moves(sources: dict[str, str]) -> Iterator[Move]:
    """Explain weights found elsewhere. sources: A's weight by the name of B's."""
    rest = dict(sources)
    for place, moves in _expert_moves(sources).items():
        names = [
            name
            for name in rest
            if (own := _EXPERT.fullmatch(name)) and own[1] == place and int(own[2]) in moves
        ]
        for name in names:
            del rest[name]
        for text in moved(moves, "expert"):
            yield Move(Explanation("experts", text), f"{place}.experts", names)
    for name in [name for name in rest if ".gate_proj." in name]:
        other = name.replace(".gate_proj.", ".up_proj.")
        if rest.get(name) == other and rest.get(other) == name:
            del rest[name], rest[other]
            explanation = Explanation("gate_up", "exchanges gate_proj and up_proj")
            yield Move(explanation, name.removesuffix(".gate_proj.weight"), [name, other])
    for name, other in rest.items():
        own, theirs = _LAYER.fullmatch(name), _LAYER.fullmatch(other)
        explanation = Explanation("other_tensor", f"has A's {other} in this place")
        if own and theirs and own[2] == theirs[2]:
            detail = f"has the weights of A's layer {theirs[1]} in layer {own[1]}"
            explanation = Explanation("other_layer", detail)
        yield Move(explanation, name, [name])


def _expert_moves(sources: dict[str, str]) -> dict[str, dict[int, int]]:
    """A's expert by B's, by MoE layer: of experts that moved with all of their projections."""
    found: dict[tuple[str, int], dict[str, tuple[str, int, str]]] = defaultdict(dict)
    for name, other in sources.items():
        own, theirs = _EXPERT.fullmatch(name), _EXPERT.fullmatch(other)
        if own and theirs:
            found[own[1], int(own[2])][own[3]] = theirs[1], int(theirs[2]), theirs[3]
    moves: dict[str, dict[int, int]] = defaultdict(dict)
    for (place, expert), projections in found.items():
        whole = {(where, number) for where, number, _ in projections.values()}
        same = all(name == own for own, (_, _, name) in projections.items())
        if len(projections) == 3 and same and len(whole) == 1:
            where, number = whole.pop()
            if where == place:
                moves[place][expert] = number
    return moves
