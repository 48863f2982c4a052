"""Keys of a GRPO phase: rollouts, losses and sampling, with the names of TRL's GRPOConfig."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowlat.engine.params import MAX_N, MAX_TOP_K
from lowlat.train.recipe.fields import Amount, Count, FromList, Table

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
LossType = Literal["grpo", "dapo", "dr_grpo"]
ScaleRewards = Literal["group", "batch", "none"]


class GRPOConfig(Table):
    """Reinforcement learning by GRPO (arXiv 2402.03300). The model samples `num_generations`
    completions per prompt, whose rewards are compared within the group.
    """

    prompts: str
    """JSON Lines file, relative to the recipe: `prompt` is a text or chat messages; rewards get the
    whole record.
    """
    reward_funcs: Annotated[tuple[str, ...], FromList, Field(min_length=1)]
    """Names of built-in rewards, and Python files, relative to the recipe, with a function
    `reward(prompt, completion, record)`.
    """
    reward_weights: Annotated[tuple[Finite, ...], FromList] | None = None
    """Weight of each reward in their sum, by default 1."""
    reward_seconds: Positive = 30.0
    """Time limit of one call of a reward function."""
    reward_memory_gb: Positive = 1.0
    """Memory limit of one call of a reward function."""
    tool: str | None = None
    """Python file, relative to the recipe, with a function `tool(prompt, completion, record)`: a
    text that it returns is a tool message, and the model continues; None ends the completion.
    Limits are those of rewards.
    """
    max_tool_calling_iterations: Count = 8
    """Maximum number of tool messages in a completion."""
    num_generations: Annotated[int, Field(ge=2, le=MAX_N)] = 8
    """Completions per prompt (the group)."""
    max_completion_length: Count = 512
    """Maximum number of tokens of a completion, tool messages included."""
    temperature: Annotated[float, Field(ge=1e-4, le=100, allow_inf_nan=False)] = 1.0
    """Sampling temperature."""
    top_p: Probability = 1.0
    """Sample from the smallest set of tokens with this total probability; 1 is off."""
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] = 0
    """Sample from the k most likely tokens; 0 is off."""
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    """Minimum probability of a token, relative to the most likely one."""
    loss_type: LossType = "dapo"
    """`grpo`: mean over the tokens of each completion; `dapo`: over the tokens of the batch;
    `dr_grpo`: over batch_size x max_completion_length.
    """
    scale_rewards: ScaleRewards = "group"
    """Standard deviation that divides advantages."""
    num_iterations: Count = 1
    """Optimizer steps per batch of completions."""
    epsilon: Amount = 0.2
    """Ratios of probabilities are clipped below 1 - epsilon."""
    epsilon_high: Amount | None = None
    """Ratios are clipped above 1 + epsilon_high, by default epsilon (DAPO: 0.28)."""
    delta: Positive | None = None
    """Bound of the ratio where the advantage is negative, above 1 + epsilon_high."""
    beta: Amount = 0.0
    """Weight of the KL divergence from base_model."""
    use_bias_correction_kl: bool = True
    """Weight the estimate of the divergence by the ratio, as in DeepSeek-V3.2; false: k3."""
    mask_truncated_completions: bool = False
    """Leave completions that reached max_completion_length out of the loss."""
    soft_punish_cache: Count | None = None
    """Tokens before max_completion_length within which the reward falls by up to 1 (DAPO)."""
    dynamic_sampling: bool = False
    """Sample more prompts in place of groups with equal rewards (DAPO)."""
    max_num_gen_batches: Count = 10
    """Maximum number of batches of prompts per step of dynamic_sampling."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> "GRPOConfig":
        weights = self.reward_weights
        if weights is not None and len(weights) != len(self.reward_funcs):
            raise ValueError(
                f"reward_weights: must have one number for each of the {len(self.reward_funcs)} "
                "reward_funcs"
            )
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        if self.delta is not None and self.delta <= 1 + high:
            raise ValueError(f"delta {self.delta:g} must be above 1 + epsilon_high, {1 + high:g}")
        cache = self.soft_punish_cache
        if cache is not None and cache > self.max_completion_length:
            raise ValueError(
                f"soft_punish_cache {cache} exceeds max_completion_length "
                f"{self.max_completion_length}; lower it"
            )
        return self
