"""Reference router (DeepSeek-V3 report, section 2.1.2), with optional known mistakes.

Shares no code with `ops.routing`, which it checks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lowlat.config.model import MoEConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GateVariant:
    """Variant of the router; the defaults are correct, every other value is a known mistake."""

    fill: float = float("-inf")
    """Score of experts outside the selected groups."""
    bias_in_weights: bool = False
    """Whether the routing weights are taken from the biased scores."""
    bias_in_choice: bool = True
    """Whether the bias is used for the selection."""
    product: torch.dtype | None = None
    """Data type of the logits (hidden state times router weight); None: not rounded."""
    scores: torch.dtype | None = None
    """Data type of the scores; None: not rounded."""
    by_best: bool = False
    """Whether groups are ranked by their best expert instead of the sum of their two best."""
    bias_in_groups: bool = True
    """Whether the bias is used for ranking groups."""


CORRECT = GateVariant()


def gate_scores(
    x: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "experts hidden"],
    moe: MoEConfig,
    rule: GateVariant = CORRECT,
) -> Float[Tensor, "tokens experts"]:
    """Unbiased scores of all experts."""
    if rule.product is None:
        logits = x @ weight.to(x.dtype).T
    else:
        logits = (x.to(rule.product) @ weight.to(rule.product).T).to(x.dtype)
    if rule.scores is not None:
        logits = logits.to(rule.scores)
    values = logits.sigmoid() if moe.scoring_func == "sigmoid" else logits.softmax(dim=-1)
    return values.to(x.dtype)


def ranking(
    scores: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, "experts"] | None,
    moe: MoEConfig,
    rule: GateVariant = CORRECT,
) -> Float[Tensor, "tokens experts"]:
    """Selection scores: each token takes its num_experts_per_tok largest. Ties are unspecified."""
    ranked = scores if bias is None or not rule.bias_in_choice else scores + bias.to(scores.dtype)
    if moe.topk_method == "greedy" or moe.n_group == 1:
        return ranked
    return _best_groups(ranked, ranked if rule.bias_in_groups else scores, moe, rule)


def selected_weights(
    chosen: Int[Tensor, "tokens chosen"],
    scores: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, "experts"] | None,
    moe: MoEConfig,
    rule: GateVariant = CORRECT,
) -> Float[Tensor, "tokens chosen"]:
    """Routing weights of the selected experts."""
    biased = scores if bias is None else scores + bias.to(scores.dtype)
    source = biased if rule.bias_in_weights else scores
    return routing_weights(source.gather(1, chosen), moe)


def _best_groups(ranked: Tensor, judged: Tensor, moe: MoEConfig, rule: GateVariant) -> Tensor:
    """`ranked` in the groups that `judged` selects, and `rule.fill` outside."""
    groups, by = (values.unflatten(-1, (moe.n_group, -1)) for values in (ranked, judged))
    sums_two = moe.topk_method == "noaux_tc" and not rule.by_best and groups.shape[-1] > 1
    best = by.sort(dim=-1, descending=True).values[..., : 2 if sums_two else 1].sum(dim=-1)
    kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : moe.topk_group]
    outside = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
    return groups.masked_fill(outside[..., None], rule.fill).flatten(-2)


def routing_weights(chosen: Float[Tensor, "tokens chosen"], moe: MoEConfig) -> Tensor:
    """Routing weights from the unbiased scores of the selected experts."""
    single = not moe.scale_after_norm and moe.num_experts_per_tok == 1
    if moe.norm_topk_prob and not single:
        scale = moe.routed_scaling_factor if moe.scale_after_norm else 1.0
        return chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) * scale
    return chosen * moe.routed_scaling_factor
