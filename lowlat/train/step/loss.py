"""Training losses: next-token cross entropy, multi-token prediction (MTP, DeepSeek-V3 section 2.2),
z-loss and distillation, with the target mask of each head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.data.batch import Batch
from lowlat.model.transformer import Transformer
from lowlat.ops.cross_entropy import linear_cross_entropy
from lowlat.ops.divergence import linear_divergence
from lowlat.train.step.teacher import Teacher, TeacherHead


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSums:
    """Sums over the targets of some sequences, fp32."""

    total: Float[Tensor, ""]
    """The differentiable total: the weighted sum of all losses. Loss scaling: each is divided by
    its number of targets in the global batch, so the totals of micro-batches (gradient
    accumulation) and processes add up.
    """
    heads: Float[Tensor, "heads"]
    """Negative log-likelihoods of the main head and of each MTP module, nats."""
    z: Float[Tensor, ""]
    """Squared log-denominators of the main head; zero with a teacher."""
    matched: Float[Tensor, ""] | None = None
    """With a teacher, the main head's KL divergence from it, nats."""

    def figures(self) -> Float[Tensor, "figures"]:
        """Heads, z and, with a teacher, the divergence: fp64 on the CPU."""
        more = [self.z] if self.matched is None else [self.z, self.matched]
        return torch.cat([self.heads, torch.stack(more)]).double().cpu()


def counted(batch: Batch, num_ahead: int, depth: int) -> Bool[Tensor, "rows sequence_length"]:
    """Loss mask (in place of labels of -100, ignore_index) of head `depth`: 0 the main head, k + 1
    MTP module k.

    A token is a target of an MTP module if all tokens on the way to it are targets, too, so that no
    module predicts across a document boundary.
    """
    length = batch.sequence_length(num_ahead)
    result = batch.loss_mask[:, 1 : length + 1]
    for further in range(2, depth + 2):
        result = result & batch.loss_mask[:, further : length + further]
    return result


def count_targets(batch: Batch, num_ahead: int) -> list[int]:
    """Number of targets of the main head and of each MTP module."""
    return [int(counted(batch, num_ahead, depth).sum()) for depth in range(num_ahead)]


def batch_loss(
    model: Transformer,
    batch: Batch,
    attention: AttentionBackend,
    positions: Tensor,
    *,
    targets: Sequence[int],
    mtp_weight: float,
    z_weight: float,
    dtype: torch.dtype,
    teacher: Teacher | None = None,
    is_warmup: bool = False,
) -> LossSums:
    """Losses of `batch` with activations of `dtype`; `targets` are the global batch's
    `count_targets`. MTP loss as in DeepSeek-V3 equations 24 and 25: averaged over depths and
    weighted by lambda. With `teacher` the main head is distilled from it. In the warm-up of
    indexers there are no losses of heads.
    """
    length = batch.sequence_length(1 + len(model.mtp))
    ids = batch.tokens[:, :length].flatten()
    taught = None if teacher is None else teacher.head(ids, positions, attention)
    hidden = model(ids, positions, attention, dtype=dtype)
    return head_losses(
        model,
        hidden,
        batch,
        attention,
        positions,
        targets=targets,
        mtp_weight=mtp_weight,
        z_weight=z_weight,
        taught=taught,
        is_warmup=is_warmup,
    )


def head_losses(
    model: Transformer,
    hidden: Float[Tensor, "tokens hidden"],
    batch: Batch,
    attention: AttentionBackend,
    positions: Tensor,
    *,
    targets: Sequence[int],
    mtp_weight: float,
    z_weight: float,
    taught: TeacherHead | None = None,
    is_warmup: bool = False,
) -> LossSums:
    """The part of `batch_loss` after the final norm, with its output `hidden`: heads and MTP
    modules; the main head is distilled from `taught`. In the warm-up of indexers, `total` is 0: its
    backward pass reaches the gradients of their KL losses.
    """
    num_ahead = 1 + len(model.mtp)
    length = batch.sequence_length(num_ahead)
    tokens = batch.tokens
    sums = []
    total = z = torch.zeros((), device=tokens.device)
    matched = None
    for depth in range(num_ahead):
        if depth:
            ahead = tokens[:, depth : length + depth].flatten()
            hidden = model.mtp_hidden(depth - 1, hidden, ahead, positions, attention)
        if is_warmup:
            total = total + 0.0 * hidden.float().sum()
            sums.append(z)
            continue
        head = model.head_weight(depth)
        following = tokens[:, depth + 1 : length + depth + 1].flatten()
        counts = counted(batch, num_ahead, depth).flatten()
        weight = mtp_weight / (num_ahead - 1) if depth else 1.0
        if taught is not None and not depth:
            teacher = taught.hidden, taught.weight
            found = linear_divergence(
                hidden, head, *teacher, following, counts, nll_weight=taught.cross_entropy
            )
            matched = found.kl.detach()
        else:
            found = linear_cross_entropy(
                hidden, head, following, counts, z_weight=0.0 if depth else z_weight
            )
            z = z if depth else found.z.detach()
        total = total + found.total * (weight / max(1, targets[depth]))
        sums.append(found.nll.detach())
    return LossSums(total=total, heads=torch.stack(sums), z=z, matched=matched)
