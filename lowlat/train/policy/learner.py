"""Forward and backward passes of a batch of sequences: log-probabilities by the engine's kernels,
GRPO losses, gradients of the fp32 master weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lowlat.config.model import ModelConfig
from lowlat.model.transformer import Transformer
from lowlat.ops.bf16_products import product
from lowlat.ops.cross_entropy import CHUNK_ELEMENTS, even_chunks
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.policy.backward import PolicyBackward
from lowlat.train.policy.balance import SequenceBalance
from lowlat.train.policy.distribution import Masks, SamplingDistribution, entropy
from lowlat.train.policy.forward import (
    PolicyForward,
    PolicyPass,
    PolicySequence,
    TrainerForward,
)
from lowlat.train.policy.loss import LossOptions, sequence_weights, token_losses
from lowlat.train.policy.mtp import MTPTraining, num_targets
from lowlat.train.policy.weights import PolicyWeights
from lowlat.train.recipe.schema import LoraConfig


@dataclass(kw_only=True, slots=True)
class PolicyBatch:
    """Sequences of one optimizer step, or of several over the same ones: each a completion after
    its prompt. With a tool, each turn of a completion is a sequence, so that tool messages are in
    prompts alone and have no loss.
    """

    sequences: list[PolicySequence]
    advantages: list[float]
    is_counted: list[bool]
    """Whether a sequence takes part in the loss."""
    logprobs: list[tuple[float, ...]] = field(default_factory=list)
    """What the engine sampled the tokens of each sequence from (`Rollout.logprobs`); empty:
    unknown.
    """
    completions: list[int] = field(default_factory=list)
    """Number of the completion that each sequence is a turn of; empty: each is one."""
    updates: int = 0
    """Optimizer steps over the batch so far."""
    old_logps: dict[int, Float64[Tensor, " _"]] = field(default_factory=dict)
    """Log-probabilities of the tokens of each sequence before the first update, by its number. The
    first update makes them, those of the reference and the sampling masks, in data parallelism for
    this process's sequences.
    """
    ref_logps: dict[int, Float64[Tensor, " _"]] = field(default_factory=dict)
    masks: dict[int, Masks] = field(default_factory=dict)

    @property
    def lengths(self) -> list[int]:
        """Sampled tokens of each sequence that count."""
        counted = zip(self.sequences, self.is_counted, strict=True)
        return [len(own.completion) if counts else 0 for own, counts in counted]

    def token_weights(self, options: LossOptions) -> list[float]:
        """Weight of each token of each sequence: that of its completion, all turns together."""
        numbers = self.completions or range(len(self.sequences))
        lengths = [0] * (1 + max(numbers))
        for number, length in zip(numbers, self.lengths, strict=True):
            lengths[number] += length
        weights = sequence_weights(lengths, options)
        return [weights[number] for number in numbers]


@dataclass(kw_only=True, slots=True)
class PolicyFigures:
    """What is logged of a batch: sums over its counted tokens."""

    loss: float = 0.0
    """The loss, which is a weighted sum over the tokens."""
    tokens: int = 0
    num_inputs: int = 0
    """Input tokens of the sequences, counted or not."""
    entropy: float = 0.0
    kl: float | None = None
    clipped: int = 0
    mismatch: float | None = None
    """Largest difference of a token's log-probability between the engine and the first update; None
    if not measured.
    """
    experts: dict[int, Float64[Tensor, " experts"]] = field(default_factory=dict)
    """Choices of every expert, by layer, over the sequences' inputs."""
    sequence_loss: float = 0.0
    """Sequence-wise balance loss, alpha included."""
    mtp_losses: list[float] = field(default_factory=list)
    """Loss of each MTP module, mean over the targets of the batch; empty if they are frozen."""

    def add(self, other: "PolicyFigures") -> None:
        """Count `other`, too."""
        self.loss += other.loss
        self.tokens += other.tokens
        self.num_inputs += other.num_inputs
        self.entropy += other.entropy
        self.sequence_loss += other.sequence_loss
        self.clipped += other.clipped
        if other.kl is not None:
            self.kl = (self.kl or 0.0) + other.kl
        if other.mismatch is not None:
            self.mismatch = largest(other.mismatch, self.mismatch or 0.0)
        for layer, counts in other.experts.items():
            self.experts[layer] = self.experts.get(layer, 0) + counts
        pairs = zip_longest(self.mtp_losses, other.mtp_losses, fillvalue=0.0)
        self.mtp_losses = [own + more for own, more in pairs]


class PolicyLearner:
    """Trains `trained`, fp32 master weights or low-rank updates `lora` of a bf16 model, whose
    rounded weights are `model`, for the engine.
    """

    def __init__(
        self,
        trained: Transformer,
        lora: LoraConfig | None,
        *,
        distribution: SamplingDistribution,
        options: LossOptions,
        reference: Transformer | None = None,
        sequence_weight: float = 0.0,
        mesh: ProcessMesh | None = None,
    ) -> None:
        """reference: the bf16 model of the KL divergence; sequence_weight: alpha of the
        sequence-wise balance loss; mesh: divides the sequences of a batch among its processes
        (data parallelism).
        """
        self._sequence_weight = sequence_weight
        self._balance = SequenceBalance()
        self._mesh = mesh or ProcessMesh()
        self.weights = PolicyWeights(trained, lora)
        """What engine and passes share."""
        self.model = self.weights.new_model()
        self.forward: TrainerForward = PolicyForward(self.model)
        """Computes what is trained; studies replace it by a pass with other bits."""
        self._backward = PolicyBackward(self.weights, self._balance)
        self._mtp = MTPTraining(self.weights, self._backward.model)
        self._reference = None if reference is None else PolicyForward(reference)
        self._distribution = distribution
        self.options = options
        tied = trained.lm_head is None
        self._head_name = "embed_tokens.weight" if tied else "lm_head.weight"

    def refresh(self) -> None:
        """Round the updated master weights. The engine must take them over, too."""
        self.weights.refresh()
        self.forward.refresh()

    def accumulate(
        self, batch: PolicyBatch, micro_batch_size: int, mtp_weight: float = 0.0
    ) -> PolicyFigures:
        """Add the gradients of the loss of this process's sequences of `batch` to those of the
        master weights. Returns the figures of the whole batch, summed in the order of its
        micro-batches in any number of processes; collective.

        mtp_weight: that of the MTP loss, averaged over modules (lambda); 0 freezes them.
        """
        if self.options.importance_sampling_clip_max is not None and (
            not batch.logprobs or self._distribution != SamplingDistribution()
        ):
            raise ValueError(
                "importance sampling needs the sampler's log-probabilities, at temperature 1 and "
                "without filters"
            )
        weights = batch.token_weights(self.options)
        self._balance.weight = self._sequence_weight / len(batch.sequences)
        targets = self._mtp_targets(batch) if mtp_weight else []
        factors = [mtp_weight / (len(targets) * count) for count in targets]
        own = self._mesh.share(len(batch.sequences))
        parts = [
            self._micro_batch(batch, own[start : start + micro_batch_size], weights, factors)
            for start in range(0, len(own), micro_batch_size)
        ]
        figures = PolicyFigures()
        for part in chain.from_iterable(self._mesh.gather(parts, "data")):
            figures.add(part)
        pairs = zip(figures.mtp_losses, targets, strict=True)
        figures.mtp_losses = [total / count for total, count in pairs]
        return figures

    def _mtp_targets(self, batch: PolicyBatch) -> list[int]:
        """Targets of every MTP module in the counted sequences of `batch`, at least 1."""
        pairs = zip(batch.sequences, batch.is_counted, strict=True)
        counted = [own for own, counts in pairs if counts]
        modules = range(self.model.config.num_nextn_predict_layers)
        return [max(1, num_targets(counted, depth)) for depth in modules]

    @torch.no_grad()
    def _micro_batch(
        self,
        batch: PolicyBatch,
        part: range,
        weights: Sequence[float],
        mtp_factors: Sequence[float],
    ) -> PolicyFigures:
        """Gradients and sums of the sequences `part`; weights: of the tokens of every sequence;
        mtp_factors: of a target of each MTP module, none if they are frozen.
        """
        sequences = [batch.sequences[number] for number in part]
        run = self.forward.run(sequences)
        figures = PolicyFigures(num_inputs=len(run.ids))
        self._balance.lengths, self._balance.loss = run.lengths, 0.0
        reference = None
        if self._reference is not None and batch.updates == 0:
            reference = self._reference.run(sequences, keeps=False)
        tokens = _tokens(batch, part, weights)
        grad = torch.zeros_like(run.hidden)
        for rows in self._chunks(run):
            logits = self.forward.logits(run, rows)
            if batch.updates == 0:
                tokens.masks += self._distribution.masks(logits) or []
            masks = tokens.masks[rows] if tokens.masks else None
            logps = self._distribution.log_probabilities(logits, masks)
            if batch.updates == 0:
                tokens.old_logps.append(_of_targets(logps, run.targets[rows]))
                if tokens.logprobs:
                    found = _mismatch(logits, run.targets[rows], tokens.logprobs[rows])
                    figures.mismatch = largest(found, figures.mismatch or 0.0)
            if reference is not None and self._reference is not None:
                logits = self._reference.logits(reference, rows)
                ref = self._distribution.log_probabilities(logits, masks)
                tokens.ref_logps.append(_of_targets(ref, run.targets[rows]))
            self._chunk_gradient(run, rows, logps, tokens, grad, figures)
        if batch.updates == 0:
            tokens.keep(batch, part)
        self._backward.run(run, grad)
        _count_experts(run, self.model.config, figures)
        if mtp_factors:
            counted = [batch.is_counted[number] for number in part]
            found = self._mtp.run(run, sequences, counted, mtp_factors)
            figures.mtp_losses = found.losses
            figures.experts |= found.experts
        figures.sequence_loss = self._balance.loss
        return figures

    def _chunk_gradient(
        self,
        run: PolicyPass,
        rows: slice,
        logps: Float64[Tensor, "rows vocab"],
        tokens: "_Tokens",
        grad: Float[Tensor, "tokens hidden"],
        figures: PolicyFigures,
    ) -> None:
        """Write the gradient of the loss by the hidden states of some rows to `grad`; add that by
        the head to its master weight.
        """
        targets, hidden = run.targets[rows], run.hidden[run.rows[rows]]
        factors = self._loss_gradient(_of_targets(logps, targets), tokens, rows, figures)
        figures.entropy += float(entropy(logps)[tokens.weights[rows] > 0].sum())
        by_logits = self._distribution.gradient(logps, targets, factors).to(torch.bfloat16)
        grad[run.rows[rows]] = product(by_logits, self.weights.tensors[self._head_name])
        master = self.weights.master(self._head_name)
        if master is not None:
            own = product(by_logits.T, hidden).to(master.dtype)
            master.grad = own if master.grad is None else master.grad.add_(own)

    def _loss_gradient(
        self, logps: Float64[Tensor, "rows"], tokens: "_Tokens", rows: slice, figures: PolicyFigures
    ) -> Float64[Tensor, "rows"]:
        """Gradient of the loss by the log-probabilities of some tokens, which are logged."""
        weights = tokens.weights[rows]
        old, ref = torch.cat(tokens.old_logps)[rows], None
        if tokens.ref_logps:
            ref = torch.cat(tokens.ref_logps)[rows]
        sampled = None
        if self.options.importance_sampling_clip_max is not None:
            sampled = torch.tensor(tokens.logprobs[rows], dtype=torch.float64)
        with torch.enable_grad():
            leaf = logps.detach().requires_grad_()
            advantages = tokens.advantages[rows]
            found = token_losses(leaf, old, ref, advantages, self.options, sampled)
            loss = (found.losses * weights).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        counted = weights > 0
        figures.loss += loss.item()
        figures.tokens += int(counted.sum())
        figures.clipped += int(found.is_clipped[counted].sum())
        if found.kl is not None:
            figures.kl = (figures.kl or 0.0) + found.kl[counted].sum().item()
        return gradient

    def _chunks(self, run: PolicyPass) -> list[slice]:
        most = max(1, CHUNK_ELEMENTS // 2 // self.model.config.vocab_size)
        return even_chunks(len(run.rows), most)


@dataclass(kw_only=True, slots=True)
class _Tokens:
    """Of every sampled token of a micro-batch; the first update makes the lists."""

    lengths: list[int]
    advantages: Float64[Tensor, "tokens"]
    weights: Float64[Tensor, "tokens"]
    old_logps: list[Float64[Tensor, " _"]]
    ref_logps: list[Float64[Tensor, " _"]]
    masks: list[Int[Tensor, " _"]]
    logprobs: list[float]

    def keep(self, batch: PolicyBatch, part: range) -> None:
        """Add the lists to those of `batch`, of which these are the sequences `part`."""
        batch.old_logps |= zip(part, torch.cat(self.old_logps).split(self.lengths), strict=True)
        if self.ref_logps:
            batch.ref_logps |= zip(part, torch.cat(self.ref_logps).split(self.lengths), strict=True)
        if self.masks:
            batch.masks |= zip(part, masks_of(self.masks, self.lengths), strict=True)


def masks_of(masks: Sequence[Int[Tensor, " _"]], lengths: Sequence[int]) -> list[Masks]:
    """The `masks` of all tokens as one list per sequence of `lengths` tokens."""
    rest = iter(masks)
    return [list(islice(rest, length)) for length in lengths]


def _tokens(batch: PolicyBatch, part: range, weights: Sequence[float]) -> _Tokens:
    """Of the sequences `part`; `weights`: of the tokens of every sequence."""
    lengths = [len(batch.sequences[number].completion) for number in part]
    counted = [weights[n] if batch.is_counted[n] else 0.0 for n in part]
    advantages = [batch.advantages[n] for n in part]
    repeats = torch.tensor(lengths)
    return _Tokens(
        lengths=lengths,
        advantages=torch.tensor(advantages, dtype=torch.float64).repeat_interleave(repeats),
        weights=torch.tensor(counted, dtype=torch.float64).repeat_interleave(repeats),
        old_logps=[batch.old_logps[n] for n in part if batch.updates],
        ref_logps=[batch.ref_logps[n] for n in part if batch.updates and batch.ref_logps],
        masks=[mask for n in part if batch.updates and batch.masks for mask in batch.masks[n]],
        logprobs=[logprob for n in part if batch.logprobs for logprob in batch.logprobs[n]],
    )


def _mismatch(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, "rows"], logprobs: Sequence[float]
) -> float:
    """Largest difference between the targets' log-probabilities, computed as the sampler does, and
    `logprobs`.
    """
    found = _of_targets(logits.log_softmax(dim=-1), targets).double()
    return (found - torch.tensor(logprobs, dtype=torch.float64)).abs().max().item()


def largest(*values: float) -> float:
    """The largest of `values`; NaN if one is."""
    return torch.tensor(values, dtype=torch.float64).max().item()


def _of_targets(
    logps: Float[Tensor, "rows vocab"], targets: Int[Tensor, "rows"]
) -> Float[Tensor, "rows"]:
    return logps.gather(1, targets[:, None])[:, 0]


def _count_experts(run: PolicyPass, config: ModelConfig, figures: PolicyFigures) -> None:
    """Set the choices of the gates of all MoE layers."""
    assert run.kept is not None
    if run.kept.experts is None or config.moe is None:
        return
    for layer, chosen in enumerate(run.kept.experts):
        if config.is_moe_layer(layer):
            counts = torch.bincount(chosen.flatten(), minlength=config.moe.n_routed_experts)
            figures.experts[layer] = counts.double()
