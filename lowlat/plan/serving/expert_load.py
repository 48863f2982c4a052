"""Load of the busiest rank under expert parallelism: distinct experts read and tokens computed per
layer, by simulated group-limited routing.

The ranks of a stage wait for the busiest one. With few tokens it has far more than the mean: of 8
chosen experts on 4 ranks, 2 are the mean and 3.9 the expected maximum in DeepSeek-V3.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lowlat.config.model import ModelConfig, MoEConfig
from lowlat.ops.expert_placement import imbalance, rebalance_experts
from lowlat.plan.serving.step_cost import expected_experts
from lowlat.utils.errors import UserError
from lowlat.utils.strict_json import MAX_JSON_BYTES, parse_object

ROWS = 2048
"""Most simulated tokens."""
LEAST_TRIALS = 4
MOST_TOKENS = 2**53
"""Largest count of an expert, which a float holds exactly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """Work of the busiest rank per layer."""

    experts: float
    """Expected distinct experts that it reads."""
    choices: float
    """Expected tokens times experts that it computes."""


@lru_cache(maxsize=1024)
def busiest_rank(
    moe: MoEConfig, tokens: int, ranks: int, imbalance: int | float = 1.0
) -> ExpertLoad:
    """The busiest of `ranks` ranks with equal numbers of experts, for a batch of `tokens` tokens.

    All experts, and all groups, are equally likely. imbalance: load of the busiest rank over the
    mean that unequal experts add.
    """
    if ranks == 1:
        choices = float(tokens * moe.num_experts_per_tok)
        return ExpertLoad(experts=expected_experts(moe, tokens), choices=choices)
    sample = min(tokens, ROWS // LEAST_TRIALS)
    chosen = _routing(moe, sample)
    owner = np.arange(moe.n_routed_experts) * ranks // moe.n_routed_experts
    per_expert = chosen.sum(axis=1)
    held = moe.n_routed_experts / ranks
    members = np.eye(ranks)[owner]
    used = ((per_expert > 0) @ members).max(axis=1).mean()
    choices = (per_expert @ members).max(axis=1).mean()
    if sample < tokens:
        # with this many tokens the fluctuation of a rank's load falls as 1 / sqrt(tokens)
        mean = tokens * moe.num_experts_per_tok / ranks
        excess = choices / (sample * moe.num_experts_per_tok / ranks) - 1
        choices = mean * (1 + excess * (sample / tokens) ** 0.5)
        used = held * (1 - (1 - used / held) ** (tokens / sample))
    return ExpertLoad(
        experts=float(min(held, used * imbalance)), choices=float(choices * imbalance)
    )


@lru_cache(maxsize=32)
def _routing(moe: MoEConfig, tokens: int) -> np.ndarray:
    """[trials, tokens, experts]: whether a token uses an expert."""
    trials = max(LEAST_TRIALS, min(256, ROWS // tokens))
    scores = np.random.default_rng(0).random((trials, tokens, moe.n_routed_experts))
    if moe.n_group > 1 and moe.topk_group < moe.n_group:
        groups = scores.reshape(trials, tokens, moe.n_group, -1)
        best = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        dropped = best < np.sort(best, axis=-1)[..., -moe.topk_group, None]
        groups[dropped] = -1
        scores = groups.reshape(scores.shape)
    least = np.sort(scores, axis=-1)[..., -moe.num_experts_per_tok, None]
    return scores >= least


class Balance(NamedTuple):
    """Load of the busiest rank over the mean, averaged over the layers."""

    in_order: float
    """Experts divided by their number."""
    placed: float
    """Experts and their replicas placed by EPLB."""


@lru_cache(maxsize=64)
def balance(
    moe: MoEConfig, loads: tuple[tuple[int, ...], ...], *, ranks: int, nodes: int, redundant: int
) -> Balance:
    """The balance of measured `loads` [layers, experts] over `ranks` ranks on `nodes` nodes, with
    `redundant` replicas per layer beyond one of each expert.

    Raises UserError for numbers that do not divide.
    """
    weight = torch.tensor(loads, dtype=torch.float64)
    in_order = torch.arange(moe.n_routed_experts).expand(len(weight), -1)
    replicas = moe.n_routed_experts + redundant
    placed = rebalance_experts(weight, replicas, moe.n_group, nodes, ranks)[0]
    before, after = (imbalance(weight, each, ranks).mean() for each in (in_order, placed))
    return Balance(float(before), float(after))


def read_loads(path: Path, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """The loads in a file of `lowlat eval --expert-loads`, by layer and expert. Raises UserError
    naming the file for others.
    """
    where = f"--expert-loads {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from error
    loads = parse_object(data, where).get("loads")
    experts = config.moe.n_routed_experts if config.moe else 0
    if not experts:
        raise UserError(f"{where}: the model has no routed experts")
    if not isinstance(loads, dict) or not loads:
        raise UserError(f"{where}: has no loads; write it with lowlat eval --expert-loads")
    for layer, counts in loads.items():
        is_counts = isinstance(counts, list) and all(
            isinstance(count, int) and not isinstance(count, bool) and 0 <= count <= MOST_TOKENS
            for count in counts
        )
        if not is_counts or len(counts) != experts:
            raise UserError(
                f"{where}: loads.{layer}: must be a count for each of the model's {experts} "
                "experts, from 0 to 2^53"
            )
    return tuple(tuple(counts) for counts in loads.values())
