"""The losses of a batch: next token, MTP, z. Owns which tokens are targets of which head.

The sequence-wise balance loss is added inside the gates, by `balance`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.model.transformer import Transformer
from lowlat.ops.cross_entropy import linear_cross_entropy
from lowlat.train.batch import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSums:
    """Sums over the targets of some rows, fp32."""

    total: Float[Tensor, ""]
    """What is differentiated: the weighted sum of everything, each divided by its number of
    targets in the global batch.
    """
    heads: Float[Tensor, "heads"]
    """Negative log-likelihoods of the main head and of each MTP module, nats."""
    z: Float[Tensor, ""]
    """Squared log-denominators of the main head."""


def counted(batch: Batch, num_ahead: int, depth: int) -> Bool[Tensor, "rows sequence_length"]:
    """Which targets of head `depth` count: 0 the main head, k + 1 MTP module k.

    A token counts for an MTP module where all tokens on the way to it count too, so that no module
    predicts across the border of a document.
    """
    length = batch.sequence_length(num_ahead)
    result = batch.predicted[:, 1 : length + 1]
    for further in range(2, depth + 2):
        result = result & batch.predicted[:, further : length + further]
    return result


def count_targets(batch: Batch, num_ahead: int) -> list[int]:
    """Targets of the main head and of each MTP module."""
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
) -> LossSums:
    """Losses of `batch` with activations of `dtype`; `targets` are the global batch's
    `count_targets` (DeepSeek-V3 equations 24 and 25: MTP losses are averaged over depths and
    weighted by lambda).
    """
    length = batch.sequence_length(1 + len(model.mtp))
    hidden = model(batch.tokens[:, :length].flatten(), positions, attention, dtype=dtype)
    return head_losses(
        model,
        hidden,
        batch,
        attention,
        positions,
        targets=targets,
        mtp_weight=mtp_weight,
        z_weight=z_weight,
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
) -> LossSums:
    """The part of `batch_loss` after the final norm, which gave `hidden`: heads and MTP modules."""
    num_ahead = 1 + len(model.mtp)
    length = batch.sequence_length(num_ahead)
    tokens = batch.tokens
    sums = []
    total = z = torch.zeros((), device=tokens.device)
    for depth in range(num_ahead):
        if depth:
            ahead = tokens[:, depth : length + depth].flatten()
            hidden = model.mtp_hidden(depth - 1, hidden, ahead, positions, attention)
        entropy = linear_cross_entropy(
            hidden,
            model.head_weight(depth),
            tokens[:, depth + 1 : length + depth + 1].flatten(),
            counted(batch, num_ahead, depth).flatten(),
            z_weight=0.0 if depth else z_weight,
        )
        weight = mtp_weight / (num_ahead - 1) if depth else 1.0
        total = total + entropy.total * (weight / max(1, targets[depth]))
        sums.append(entropy.nll.detach())
        if not depth:
            z = entropy.z.detach()
    return LossSums(total=total, heads=torch.stack(sums), z=z)
