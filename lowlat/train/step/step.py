"""One training step: forward and backward passes, optimizer update, routing bias update; and
evaluation.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from lowlat.data.batch import Batch
from lowlat.train.metrics.record import ExpertRecord, IndexerRecord
from lowlat.train.parallel.mesh import BATCH_AXES, TOKEN_AXES, ProcessMesh
from lowlat.train.recipe.schedule import StepPlan
from lowlat.train.step.balance import LoadBalancer
from lowlat.train.step.indexers import IndexerLosses
from lowlat.train.step.loss import count_targets
from lowlat.train.step.optim import Optimizer
from lowlat.train.step.passes import Passes


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Losses and statistics of a step."""

    losses: tuple[float, ...]
    """Mean negative log-likelihood of the main head and of each MTP module, nats per token.

    Heads without a target in the batch are omitted; empty in layer-wise distillation and in the
    warm-up of indexers.
    """
    z: float
    """Mean squared log-denominator of the main head; 0 without targets."""
    sequence_loss: float
    """Sequence-wise balance loss, alpha included, summed over layers."""
    grad_norm: float
    """Global norm before clipping; NaN if a loss is not finite."""
    loads: tuple[ExpertRecord, ...]
    """Load of every gate, with its bias after the step; empty if only attention runs."""
    matched: float | None = None
    """With a teacher, mean divergence from it in nats per token, or in layer-wise distillation the
    relative squared error; None without targets.
    """
    indexers: tuple[IndexerRecord, ...] = ()
    """Losses and recall of every indexer; empty with dense attention."""
    has_targets: bool = True
    """Whether the global batch has a target; without one, no weight is updated."""
    mtp_losses: tuple[float, ...] = ()
    """As in `losses`, of a phase without a loss of the main head."""
    num_inputs: int | None = None
    """Input tokens without padding; None: all of the batch."""

    @property
    def is_finite(self) -> bool:
        """Whether losses and gradient are finite; if not, nothing was updated."""
        kl = [layer.kl for layer in self.indexers]
        values = torch.tensor([*self.losses, self.matched or 0.0, self.grad_norm, *kl])
        return bool(values.isfinite().all())


def train_step(
    passes: Passes,
    optimizer: Optimizer,
    balancer: LoadBalancer,
    batch: Batch,
    plan: StepPlan,
    *,
    num_ahead: int,
    indexers: IndexerLosses | None = None,
    mesh: ProcessMesh | None = None,
) -> StepResult:
    """Train on one global batch, of which `batch` is this process's part; num_ahead = 1 +
    num_nextn_predict_layers; indexers: those of a sparse model, which are trained, too.

    No weight is updated if a loss or the gradient is not finite (`is_finite` is false) or if the
    batch has no target (`has_targets` is false).
    """
    mesh = mesh or ProcessMesh()
    indexers = indexers or IndexerLosses()
    targets = mesh.sum(torch.tensor(count_targets(batch, num_ahead)), BATCH_AXES).tolist()
    length = batch.sequence_length(num_ahead)
    rows = batch.rows * mesh.data_parallel_size
    with (
        balancer.observe(sequence_length=length, num_sequences=rows),
        indexers.observe(queries=rows * length, coeff=plan.phase.dsa_indexer_loss_coeff),
    ):
        sums = passes.backward(batch, plan, targets)
    balancer.reduce()
    sums = mesh.sum(sums, TOKEN_AXES)
    more = len(sums) - num_ahead
    # Heads without a target have zero sums and no mean.
    means = sums / torch.tensor([*targets, *(targets[0] for _ in range(more))]).clamp(min=1)
    num_heads = sum(count > 0 for count in targets)
    if num_heads and means.isfinite().all():
        norm = optimizer.step(plan.learning_rate)
    else:  # gradients may still be finite, and weight decay applies without gradients
        optimizer.zero_grad()
        norm = math.nan if num_heads else 0.0
    match = plan.phase.match
    result = StepResult(
        losses=tuple(means[:num_heads].tolist()) if plan.phase.trains_heads else (),
        z=means[num_ahead].item(),
        sequence_loss=balancer.sequence_loss,
        grad_norm=norm,
        loads=(),
        matched=means[num_ahead + 1].item() if more > 1 and num_heads else None,
        indexers=indexers.records(),
        has_targets=num_heads > 0,
    )
    trains_gates = match != "attention" and not plan.phase.is_warmup
    if result.is_finite and result.has_targets and trains_gates:
        balancer.update_biases(plan.bias_update_speed)
    return replace(result, loads=() if match == "attention" else tuple(balancer.loads()))


@torch.no_grad()
def evaluate(
    passes: Passes, batches: Iterable[Batch], *, num_ahead: int, mesh: ProcessMesh | None = None
) -> tuple[float, ...]:
    """Mean loss of every head, and with a teacher the mean KL divergence, in nats per token.

    NaN for a head without targets.

    Every process must pass the same number of `batches`. No weight or counter changes.
    """
    mesh = mesh or ProcessMesh()
    sums = torch.zeros((), dtype=torch.float64)
    counts = torch.zeros(num_ahead, dtype=torch.float64)
    for batch in batches:
        sums = sums + passes.likelihood(batch)
        counts += torch.tensor(count_targets(batch, num_ahead))
    sums, counts = mesh.sum(sums, ("pipeline", *TOKEN_AXES)), mesh.sum(counts, BATCH_AXES)
    counts = torch.cat([counts, counts[:1].expand(len(sums) - num_ahead)])
    return tuple((sums / counts).tolist())
