"""Log records of training: start, step, evaluation and note, with units."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRecord:
    """Expert load balance of one MoE layer over the global batch of a step."""

    layer: int
    """Decoder layer from 0; MTP modules follow the last decoder layer."""
    load: tuple[float, ...]
    """Share of the routed token-expert pairs per expert; the sum is 1. Empty in log records that
    omit it to save space.
    """
    max_violation: float
    """MaxVio = largest load / mean load - 1 (arXiv 2408.15664, section 4.1): 0 is perfect balance;
    the maximum, n / k - 1, means that every token chooses the same expert among its k of n.
    """
    entropy: float
    """Entropy of the load over ln(experts): 1 is perfect balance. The minimum, ln k / ln n, means
    that all tokens choose the same k of n experts.
    """
    bias_min: float
    """Smallest routing bias after the step."""
    bias_max: float
    """Largest routing bias after the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexerRecord:
    """Sparse attention (DSA) of one layer over the global batch of a step."""

    layer: int
    """Decoder layer from 0; MTP modules follow the last decoder layer."""
    kl: float
    """KL divergence of the indexer's distribution from the attention distribution, nats per query:
    over all visible tokens in the warm-up, else over the chosen ones. In a layer that shares a
    choice, that of the indexer that made it.
    """
    recall: float
    """Attention mass of dense attention that the index_topk chosen tokens have, mean over heads and
    over the queries that see more tokens than that; 1 if there are none.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutRecord:
    """Completions of a GRPO step and the update that learned from them."""

    loss: float
    """Policy loss, KL divergence included."""
    reward: float
    """Mean reward of the completions; NaN if all rewards failed."""
    reward_std: float
    """Standard deviation (n - 1) of the rewards."""
    length: float
    """Mean tokens of a completion."""
    truncated: float
    """Share of completions that reached max_completion_length."""
    no_signal: float
    """Share of the sampled groups whose rewards are equal."""
    failed: int
    """Completions whose reward failed."""
    entropy: float
    """Mean entropy of the sampling distribution, nats per token."""
    clipped: float
    """Share of tokens whose ratio was clipped."""
    rollout_tokens_per_second: float
    """Sampled tokens per second of sampling; 0 in later updates over the same completions."""
    update_tokens_per_second: float
    """Tokens of prompts and completions per second of forward and backward passes."""
    kl: float | None = None
    """Mean estimate of the KL divergence from the reference, nats per token."""
    mismatch: float | None = None
    """Largest difference of a token's log-probability between sampling and the first update; None
    in later updates over the same completions.
    """


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimizer step over the global batch."""

    step: int
    """Completed optimizer steps, this one included: the first step is 1."""
    phase: str
    """Phase of the recipe."""
    tokens: int
    """Input tokens so far; in GRPO, as if each row had sequence_length tokens."""
    seconds: float
    """Wall-clock seconds of steps and evaluations so far, over all resumptions."""
    loss: float | None
    """Cross-entropy of the main head before the update, nats per target; None in layer-wise
    distillation and for a batch without targets.
    """
    mtp_losses: tuple[float, ...]
    """Unweighted cross-entropy of each MTP module, nats per target; modules without a target in the
    batch are omitted.
    """
    z_loss: float
    """Weighted z-loss; 0 if off."""
    sequence_loss: float
    """Weighted sequence-wise balance loss; 0 if off."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    batch_tokens: int
    """Input tokens of this step; in GRPO, those of prompts and completions."""
    tokens_per_second: float
    """batch_tokens over the seconds of this step."""
    mfu: float | None
    """Model FLOPs utilization, relative to the measured rate of matrix products; None: unknown."""
    memory_bytes: int
    """Peak memory of one process so far: resident on the CPU, allocated on a GPU."""
    experts: tuple[ExpertRecord, ...]
    """One record per MoE layer, in order of layers; empty for a dense model."""
    divergence: float | None = None
    """With a teacher, forward KL divergence from it, nats per target."""
    layer_error: float | None = None
    """In layer-wise distillation, relative squared error, mean over layers."""
    indexers: tuple[IndexerRecord, ...] = ()
    """One record per layer with sparse attention, in order of layers."""
    rollouts: RolloutRecord | None = None
    """Of a GRPO step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassAtKRecord:
    """Completions sampled for held-out prompts, by whether they pass."""

    num_prompts: int
    num_generations: int
    """Completions per prompt (n)."""
    pass_at: dict[str, float]
    """pass@k by k: probability that one of k completions passes, mean over prompts."""
    stderr: dict[str, float]
    """Standard error of these means over prompts; NaN for one prompt."""
    score: float
    """Mean score of the function that decides; NaN if all failed."""
    length: float
    """Mean tokens of a completion."""
    truncated: float
    """Share of completions that reached the most tokens."""
    failed: int
    """Completions whose reward failed: they do not pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """One evaluation, after `step` steps."""

    step: int
    """Completed optimizer steps."""
    tokens: int
    """Input tokens of training so far."""
    split: str
    """Evaluated split, such as held_out; held_out_prompts in GRPO."""
    loss: float | None
    """Cross-entropy of the main head, nats per target; None in GRPO."""
    bits_per_byte: float | None
    """`loss` in bits per byte of text; None if unknown or if part of the text is no target."""
    mtp_losses: tuple[float, ...]
    """Cross-entropy of each MTP module, nats per target; NaN without targets."""
    divergence: float | None = None
    """With a teacher, forward KL divergence from it, nats per target."""
    targets: str | None = None
    """Kind of targets, if not all tokens are targets: "answer token" for chats."""
    pass_at_k: PassAtKRecord | None = None
    """In GRPO."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRecord:
    """Start of a run, or its resumption from a checkpoint."""

    step: int
    """Completed optimizer steps: 0, or those of the checkpoint. Earlier records of later steps are
    superseded.
    """
    name: str
    """The recipe's name."""
    total_steps: int
    """Optimizer steps of the whole recipe."""
    tokens_total: int
    """Input tokens of the whole recipe."""
    facts: dict[str, str | int | float | bool | None]
    """Other values, such as parameters, device, threads."""
    time: str
    """Time of the start, ISO 8601 in UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoteRecord:
    """A message about the run, such as a failed checkpoint."""

    step: int
    """Completed optimizer steps."""
    text: str
    """The message, on one line."""


Record = StartRecord | StepRecord | EvalRecord | NoteRecord
