"""Tables of a recipe besides its phases: optimizer, parallelism, checkpoints, logs, LoRA,
distillation.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lowlat.engine.params import MAX_N
from lowlat.train.recipe.fields import Amount, Count, FromList, Rate, Table


class OptimizerConfig(Table):
    """Optimizer and gradient clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` trains hidden matrices with Newton-Schulz steps and the other weights with AdamW."""
    betas: Annotated[tuple[Rate, Rate], FromList] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Amount = 0.1
    """Decoupled weight decay of matrices: each step scales them by 1 - learning rate x this."""
    momentum: Rate = 0.95
    """Muon's momentum."""
    max_grad_norm: Amount = 1.0
    """Clip gradients to this global norm; 0 disables clipping."""


class BalanceConfig(Table):
    """Load balancing of routed experts."""

    sequence_weight: Amount = 1e-4
    """Weight (alpha) of the sequence-wise balance loss (V3 equations 17 to 20)."""


class ParallelConfig(Table):
    """Sizes of the process mesh; the product of all but `expert` is the number of processes."""

    data: Count = 1
    """Data-parallel replicas, with summed gradients (DDP)."""
    fsdp: Count = 1
    """Processes that shard a replica's weights and optimizer state (FSDP2)."""
    expert: Count = 1
    """Processes that share the routed experts, out of the data, fsdp and context processes."""
    tensor: Count = 1
    """Tensor-parallel processes, which divide attention heads and MLP channels."""
    pipeline: Count = 1
    """Pipeline stages, which divide the layers."""
    context: Count = 1
    """Context-parallel processes, which divide each sequence."""
    pipeline_schedule: Literal["1f1b", "interleaved", "zb", "zbv", "dualpipev"] = "1f1b"
    """Order of the forward and backward passes of micro-batches."""

    @property
    def processes(self) -> int:
        return self.data * self.fsdp * self.tensor * self.pipeline * self.context


class CheckpointConfig(Table):
    """When checkpoints of the complete training state are written, and which are retained."""

    every_steps: Count = 200
    """Optimizer steps between checkpoints; every phase also ends with one."""
    keep_last: Annotated[int, Field(ge=2)] = 2
    """Number of latest checkpoints to retain."""
    keep_every_hours: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Also retain one checkpoint per this many hours."""


class EvaluationConfig(Table):
    """Evaluation on held-out documents, and of GRPO phases on held-out prompts by pass@k."""

    every_steps: Count = 200
    """Optimizer steps between evaluations; every phase also ends with one."""
    sequences: Count = 64
    """Sequences of the held-out split per evaluation, the same ones each time."""
    prompts: str | None = None
    """Held-out prompts of GRPO phases: a file such as grpo.prompts, relative to the recipe."""
    num_generations: Annotated[int, Field(ge=1, le=MAX_N)] = 8
    """Completions sampled per held-out prompt, with the sampling options of the phase."""
    pass_at: Annotated[tuple[Count, ...], FromList, Field(min_length=1)] = (1,)
    """Values of k: pass@k is the probability that one of k completions passes."""
    pass_threshold: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """Least score of the first of grpo.reward_funcs with which a completion passes."""

    @model_validator(mode="after")
    def _samples_suffice(self) -> "EvaluationConfig":
        if max(self.pass_at) > self.num_generations:
            raise ValueError(
                f"pass_at: {max(self.pass_at)} exceeds num_generations {self.num_generations}; "
                "raise it"
            )
        return self


class LogConfig(Table):
    """Logging."""

    every_steps: Count = 1
    """Optimizer steps between log records."""
    tensorboard: bool | None = None
    """Write TensorBoard files; by default, if tensorboard is installed."""


class LoraConfig(Table):
    """LoRA: low-rank updates of frozen projections (arXiv 2106.09685)."""

    rank: Count
    """Rank of the updates."""
    alpha: Amount
    """Updates are scaled by alpha / rank."""
    target_modules: Annotated[tuple[str, ...], FromList, Field(min_length=1)] = (
        "q_proj",
        "q_a_proj",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    )
    """Names of the projections that get an update."""


class DistillationConfig(Table):
    """Knowledge distillation from a frozen teacher: forward KL divergence between next-token
    distributions.
    """

    teacher: str
    """Teacher checkpoint, named as in `base_model`; it must have the model's vocabulary."""
    cross_entropy_weight: Amount = 0.0
    """Weight of the cross-entropy loss, added to the divergence."""
