"""Load of the busiest rank under expert parallelism: distinct experts read and tokens computed per
layer, by simulated group-limited routing.

The ranks of a stage wait for the busiest one. With few tokens it has far more than the mean: of 8
chosen experts on 4 ranks, 2 are the mean and 3.9 the expected maximum in DeepSeek-V3.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lowlat.config.model import MoEConfig

ROWS = 2048
"""Most simulated tokens."""
LEAST_TRIALS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoad:
    """Work of the busiest rank per layer."""

    experts: float
    """Expected distinct experts that it reads."""
    choices: float
    """Expected tokens times experts that it computes."""


@lru_cache(maxsize=1024)
def busiest_rank(moe: MoEConfig, tokens: int, ranks: int, imbalance: float = 1.0) -> ExpertLoad:
    """The busiest of `ranks` ranks with equal numbers of experts, for a batch of `tokens` tokens.

    All experts, and all groups, are equally likely. imbalance: load of the busiest rank over the
    mean that unequal experts add.
    """
    if ranks == 1:
        missed = (1 - moe.num_experts_per_tok / moe.n_routed_experts) ** tokens
        choices = float(tokens * moe.num_experts_per_tok)
        return ExpertLoad(experts=moe.n_routed_experts * (1 - missed), choices=choices)
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
