"""GRPO losses (arXiv 2402.03300), DAPO (2503.14476) and Dr. GRPO (2503.20783), with the names and
values of TRL's GRPOTrainer: clipped importance ratios, KL divergence from a reference, weights of
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from lowlat.train.recipe.grpo import LossType


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOptions:
    """Fields of TRL's GRPOConfig."""

    loss_type: LossType = "dapo"
    epsilon: float = 0.2
    """The ratio of probabilities is clipped below 1 - epsilon."""
    epsilon_high: float = 0.2
    """And above 1 + epsilon_high (clip-higher)."""
    delta: float | None = None
    """Bound of the unclipped ratio (two-sided clipping)."""
    beta: float = 0.0
    """Weight of the KL divergence from the reference."""
    use_bias_correction_kl: bool = True
    """Multiply the estimate of the divergence by the ratio (DeepSeek-V3.2's unbiased estimate)."""
    max_completion_length: int = 512
    importance_sampling_clip_max: float | None = None
    """Truncated importance sampling: weight the loss of the reward by the ratio of the trainer's
    probability to the sampler's, at most this. For sampler and trainer with different bits.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLosses:
    """Losses of tokens before their weights, and what is logged of them."""

    losses: Float64[Tensor, "tokens"]
    """Differentiable by the log-probabilities."""
    kl: Float64[Tensor, "tokens"] | None
    """Estimates of the divergence in nats, without `beta`; None without a reference."""
    is_clipped: Bool[Tensor, "tokens"]
    """Whether the token is clipped, without gradient of the reward (TRL's clip_ratio)."""


def token_losses(
    logps: Float64[Tensor, "tokens"],
    old_logps: Float64[Tensor, "tokens"],
    ref_logps: Float64[Tensor, "tokens"] | None,
    advantages: Float64[Tensor, "tokens"],
    options: LossOptions,
    sampled_logps: Float64[Tensor, "tokens"] | None = None,
) -> TokenLosses:
    """Losses of sampled tokens. logps, old_logps, ref_logps: log-probabilities under the trained
    policy, the one before the updates over the batch, and the reference; sampled_logps: those of
    the sampler, which truncated importance sampling needs.
    """
    ratio = (logps - old_logps).exp()
    clipped = ratio.clamp(1 - options.epsilon, 1 + options.epsilon_high)
    bounded = ratio if options.delta is None else ratio.clamp(max=options.delta)
    losses = -torch.min(bounded * advantages, clipped * advantages)
    if options.importance_sampling_clip_max is not None:
        assert sampled_logps is not None
        importance = (old_logps - sampled_logps).exp()
        losses = losses * importance.clamp(max=options.importance_sampling_clip_max)
    kl = None
    if ref_logps is not None:
        # k3 (http://joschu.net/blog/kl-approx.html)
        difference = ref_logps - logps
        kl = difference.exp() - difference - 1
        if options.use_bias_correction_kl:
            kl = kl * ratio
        losses = losses + options.beta * kl
    is_low = (ratio < 1 - options.epsilon) & (advantages < 0)
    is_high = (ratio > 1 + options.epsilon_high) & (advantages > 0)
    return TokenLosses(losses=losses, kl=kl, is_clipped=is_low | is_high)


def sequence_weights(lengths: Sequence[int], options: LossOptions) -> list[float]:
    """Weight of each token of each completion of a batch: the loss is the weighted sum. lengths:
    tokens that count; 0 for a masked completion.
    """
    match options.loss_type:
        case "grpo":
            return [1 / (len(lengths) * max(1, length)) for length in lengths]
        case "dapo":
            return [1 / max(1, sum(lengths))] * len(lengths)
        case "dr_grpo":
            return [1 / (len(lengths) * options.max_completion_length)] * len(lengths)
