"""Group-limited top-k routing of tokens to experts (DeepSeek-V3 section 2.1.2, DeepSeek-V2 section
2.2), the same for training and inference.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import MoEConfig
from lowlat.ops.norm import accumulation_dtype


class Routing(NamedTuple):
    """Result of `route`."""

    experts: Int[Tensor, "tokens chosen"]
    """Expert ids, best first."""
    weights: Float[Tensor, "tokens chosen"]
    """Factors on the experts' outputs, fp32."""
    scores: Float[Tensor, "tokens experts"]
    """Unbiased gate scores of all experts, fp32 (balance loss, statistics)."""


def route(
    x: Float[Tensor, "tokens hidden"],
    gate: Float[Tensor, "experts hidden"],
    bias: Float[Tensor, "experts"] | None,
    moe: MoEConfig,
    experts: Int[Tensor, "tokens chosen"] | None = None,
) -> Routing:
    """Score every expert in fp32, select by `moe.topk_method` with the selection bias, weight by
    the unbiased scores. experts: those that another pass selected (routing replay).

    DeepSeek-V3 section 2.1.2 (sigmoid, auxiliary-loss-free bias, groups scored by the sum of their
    two best) and DeepSeek-V2 section 2.2 (softmax, groups scored by their best). Ties go to the
    lowest expert id.
    """
    wide = accumulation_dtype(x.dtype)
    logits = x.to(wide) @ gate.to(wide).T
    scores = logits.sigmoid() if moe.scoring_func == "sigmoid" else logits.softmax(dim=-1)
    if experts is None:
        choice = scores if bias is None else scores + bias
        if moe.topk_method != "greedy" and moe.n_group > 1:
            choice = _keep_best_groups(choice, moe)
        experts = largest(choice, moe.num_experts_per_tok)
    return Routing(experts, _weights(scores.gather(1, experts), moe), scores)


def largest(values: Float[Tensor, "rows n"], count: int) -> Int[Tensor, "rows count"]:
    """Indices of the `count` largest values of each row, best first, ties to the lowest index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _keep_best_groups(
    choice: Float[Tensor, "tokens experts"], moe: MoEConfig
) -> Float[Tensor, "tokens experts"]:
    """Group-limited routing (node-limited in DeepSeek-V3: a group per node): mask experts outside
    the `topk_group` best groups with -inf, because 0 would win over negative biased scores.
    """
    groups = choice.unflatten(-1, (moe.n_group, -1))
    best = min(2, groups.shape[-1]) if moe.topk_method == "noaux_tc" else 1
    group_scores = groups.topk(best, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, largest(group_scores, moe.topk_group), True)
    return groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)


def _weights(
    chosen: Float[Tensor, "tokens chosen"], moe: MoEConfig
) -> Float[Tensor, "tokens chosen"]:
    # DeepSeek-V2's modelling file does not normalise the weight of a single expert.
    is_v2_single = not moe.scale_after_norm and moe.num_experts_per_tok == 1
    if not moe.norm_topk_prob or is_v2_single:
        return chosen * moe.routed_scaling_factor
    weights = chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * moe.routed_scaling_factor if moe.scale_after_norm else weights
