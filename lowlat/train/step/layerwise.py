"""Learning layer by layer: every layer of a model gets what the teacher's layer got and should make
of it what that made. So all layers learn at once, each as if the others were right.

Owns the error of a layer and the order of passes; one layer's activations live at a time.
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
    """Errors of the layers of `model` over the rows of `batch`, and their gradients.

    A layer's error in a row is |made - wanted|^2 / |wanted|^2 of all that its attention, or the
    layer as a whole, adds to its input. Rows weigh as many as they have targets, of which the
    global batch has `targets`. Returns the mean over layers, summed over the targets.
    """
    num_ahead = 1 + len(model.mtp)
    length = batch.sequence_length(num_ahead)
    weights = counted(batch, num_ahead, 0).sum(dim=1)
    tables = model.rotary(positions)
    layers = layers_of(model)
    ids = batch.tokens[:, :length].flatten()
    total = 0.0
    passes = zip(layers, teacher.layers(ids, positions, attention), strict=True)
    for number, (layer, taught) in enumerate(passes):
        rope = model.rotary.of(number, tables)
        given = taught.given.to(dtype)
        made = layer.self_attn(layer.input_layernorm(given), rope, attention)
        wanted = taught.attended
        if match == "layers":
            made = made + layer.mlp(layer.post_attention_layernorm(given + made))
            wanted = taught.added
        errors = _relative_errors(made, wanted, batch.rows)
        loss = (errors * weights).sum() / len(layers)
        if loss.requires_grad:
            (loss / max(1, targets)).backward()
        total += loss.item()
    return total


def _relative_errors(
    made: Float[Tensor, "tokens hidden"], wanted: Float[Tensor, "tokens hidden"], rows: int
) -> Float[Tensor, "rows"]:
    """Squared error of each row over the square of what is wanted, fp32 (fp64 of fp64)."""
    wide = torch.promote_types(made.dtype, torch.float32)
    wanted = wanted.to(wide)
    error = (made.to(wide) - wanted).square().view(rows, -1).sum(dim=1)
    return error / wanted.square().view(rows, -1).sum(dim=1).clamp(min=torch.finfo(wide).tiny)
