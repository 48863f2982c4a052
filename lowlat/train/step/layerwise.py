"""Layer-wise distillation: every layer of the student gets the input of the teacher's layer and
learns its output, so that all layers learn independently.

Only one layer's activations are in memory at a time; of sparse attention (DSA) those of the layers
that share a choice, because their KL losses add up in one indexer.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.attention.base import AttentionBackend
from lowlat.data.batch import Batch
from lowlat.model.transformer import Transformer
from lowlat.train.step.loss import counted
from lowlat.train.step.teacher import Teacher, layers_of


def layer_errors(
    model: Transformer,
    teacher: Teacher,
    batch: Batch,
    attention: AttentionBackend,
    positions: Tensor,
    *,
    match: Literal["attention", "layers"],
    targets: int,
    dtype: torch.dtype,
) -> float:
    """Errors of the layers of `model` over the sequences of `batch`, with backward passes.

    A layer's error in a sequence is |student - teacher|^2 / |teacher|^2 of what its attention, or
    the layer as a whole, adds to its input. A sequence's weight is its number of targets, of which
    the global batch has `targets`. Returns the mean over layers, summed over the targets.
    """
    num_ahead = 1 + len(model.mtp)
    length = batch.sequence_length(num_ahead)
    weights = counted(batch, num_ahead, 0).sum(dim=1)
    tables = model.rotary(positions)
    layers = layers_of(model)
    ids = batch.tokens[:, :length].flatten()
    total, group = 0.0, torch.zeros((), device=ids.device)
    passes = zip(layers, teacher.layers(ids, positions, attention), strict=True)
    for number, (layer, taught) in enumerate(passes):
        rope = model.rotary.of(number, tables)
        given = taught.given.to(dtype)
        made = layer.attend(given, rope, attention)
        wanted = taught.attended
        if match == "layers":
            made = made + layer.feed_forward(given + made)
            wanted = taught.added
        errors = _relative_errors(made, wanted, batch.rows)
        loss = (errors * weights).sum() / len(layers)
        total += loss.item()
        group = group + loss
        if model.config.choosing_layer(number + 1) in (None, number + 1):
            if group.requires_grad:
                (group / max(1, targets)).backward()
            group = torch.zeros_like(group)
    return total


def _relative_errors(
    made: Float[Tensor, "tokens hidden"], wanted: Float[Tensor, "tokens hidden"], rows: int
) -> Float[Tensor, "rows"]:
    """Squared error of each sequence relative to the squared target, fp32 (fp64 of fp64)."""
    wide = torch.promote_types(made.dtype, torch.float32)
    wanted = wanted.to(wide)
    error = (made.to(wide) - wanted).square().view(rows, -1).sum(dim=1)
    return error / wanted.square().view(rows, -1).sum(dim=1).clamp(min=torch.finfo(wide).tiny)
