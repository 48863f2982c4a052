"""Group-relative advantages of GRPO from rewards, and DAPO's punishment of overlong completions."""

from jaxtyping import Bool, Float64
from torch import Tensor

from lowlat.train.recipe.grpo import ScaleRewards

EPSILON = 1e-4
"""Added to standard deviations, as in TRL."""


def group_advantages(
    rewards: Float64[Tensor, "groups completions"], scale: ScaleRewards
) -> Float64[Tensor, "groups completions"]:
    """Rewards minus their group's mean; scale: divided by the standard deviation (n - 1) of the
    group, of the batch, or of none. A reward that failed is NaN: it is left out of all statistics
    and has advantage 0.
    """
    centered = rewards - rewards.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centered = centered / (_deviation(rewards) + EPSILON)
    elif scale == "batch":
        centered = centered / (_deviation(rewards.reshape(1, -1)) + EPSILON)
    return centered.nan_to_num(0.0)


def has_signal(rewards: Float64[Tensor, "groups completions"]) -> Bool[Tensor, "groups"]:
    """Which groups have different rewards; the others have no gradient."""
    return _deviation(rewards)[:, 0] > 1e-8


def soft_overlong_punishment(
    length: int, max_completion_length: int, soft_punish_cache: int
) -> float:
    """Added to the reward of a completion of `length` tokens (DAPO section 3.4): 0 up to
    max_completion_length - soft_punish_cache tokens, then falling to -1.
    """
    threshold = max_completion_length - soft_punish_cache
    if length <= threshold:
        return 0.0
    return (threshold - length) / soft_punish_cache if length <= max_completion_length else -1.0


def _deviation(rewards: Float64[Tensor, "rows columns"]) -> Float64[Tensor, "rows 1"]:
    """Standard deviation (n - 1) of every row without its NaNs; 0 for fewer than two rewards."""
    is_known = ~rewards.isnan()
    count = is_known.sum(dim=1, keepdim=True)
    centered = (rewards - rewards.nanmean(dim=1, keepdim=True)).nan_to_num(0.0)
    return (centered.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
