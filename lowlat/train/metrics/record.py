"""What is known about one step, one evaluation and the experts of one layer.

Owns the fields and their units. Measuring is the trainer's, writing that of `lines` and `runlog`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertRecord:
    """How evenly one MoE layer used its routed experts over the global batch of a step."""

    layer: int
    """Decoder layer from 0; MTP modules follow the last decoder layer."""
    load: tuple[float, ...]
    """Share of the routed token-expert pairs that went to each expert; their sum is 1. Empty in a
    log where it was left out to save space.
    """
    max_violation: float
    """MaxVio = largest load / mean load - 1 (arXiv 2408.15664, section 4.1): 0 is perfect balance;
    the most, n / k - 1, is an expert that all tokens have among the k they choose of n.
    """
    entropy: float
    """Entropy of the load over ln(experts): 1 is perfect balance. Where all tokens choose the same
    k of n experts it is ln k / ln n, the least there is, and 0 with k = 1.
    """
    bias_min: float
    """Smallest routing bias after the step, with which the next one routes."""
    bias_max: float
    """Largest routing bias after the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRecord:
    """One optimiser step, over the whole global batch."""

    step: int
    """Optimiser steps done, this one included: the first step is 1."""
    phase: str
    """The recipe's phase this step belongs to."""
    tokens: int
    """Input tokens read so far by all steps."""
    seconds: float
    """Wall-clock seconds of steps and evaluations so far, summed over all runs of a folder."""
    loss: float | None
    """Main cross-entropy before the update, nats per target; None in phases that match layers, and
    of a batch without targets, from which nothing is learned.
    """
    mtp_losses: tuple[float, ...]
    """Cross-entropy of each MTP module, unweighted, nats per target; of modules that have no target
    in the batch none, so empty where loss is None.
    """
    z_loss: float
    """The z-loss term as added to the loss; 0 where it is off."""
    sequence_loss: float
    """The sequence-wise balance term as added to the loss; 0 where it is off."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate of this step."""
    batch_tokens: int
    """Input tokens of this step."""
    tokens_per_second: float
    """batch_tokens over the seconds of this step alone."""
    mfu: float | None
    """Model FLOPs per second over the measured rate of plain matrix products; None: unknown."""
    memory_bytes: int
    """Largest memory used by one process so far: resident on the CPU, allocated on a GPU."""
    experts: tuple[ExpertRecord, ...]
    """One record per MoE layer, in order of layers; empty for a dense model."""
    divergence: float | None = None
    """With a teacher, forward KL from its next-token distribution, nats per target."""
    layer_error: float | None = None
    """In phases that match layers, their relative squared error, the mean of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRecord:
    """One evaluation, after `step` steps."""

    step: int
    """Optimiser steps done."""
    tokens: int
    """Input tokens read by training so far."""
    split: str
    """Which text was evaluated, such as held_out."""
    loss: float
    """Main cross-entropy, nats per target."""
    bits_per_byte: float | None
    """loss as bits per byte of the text; None where the bytes are not known, or not all of them are
    predicted.
    """
    mtp_losses: tuple[float, ...]
    """Cross-entropy of each MTP module, nats per target; NaN for one without."""
    divergence: float | None = None
    """With a teacher, forward KL from its next-token distribution, nats per target."""
    targets: str | None = None
    """What a target is where not every token is one: "answer token" of chats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartRecord:
    """One run of a folder begins, or goes on from a save."""

    step: int
    """Optimiser steps done before this run: 0, or those of the save it goes on from. Records of
    later steps that an earlier run left behind do not count any more.
    """
    name: str
    """The recipe's name."""
    total_steps: int
    """Optimiser steps of the whole recipe."""
    tokens_total: int
    """Input tokens of the whole recipe."""
    facts: dict[str, str | int | float | bool | None]
    """What else is worth keeping, such as parameters, device, threads."""
    time: str
    """When, ISO 8601 in UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NoteRecord:
    """One sentence about the run, such as a save that was skipped."""

    step: int
    """Optimiser steps done."""
    text: str
    """The sentence, on one line."""


Record = StartRecord | StepRecord | EvalRecord | NoteRecord
