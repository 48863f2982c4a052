"""Teacher of a distillation: a frozen model, its next-token distributions and its layer outputs."""

from collections.abc import Iterator
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowlat.attention.base import AttentionBackend
from lowlat.model.block import DecoderLayer
from lowlat.model.transformer import Transformer


class TeacherHead(NamedTuple):
    """Next-token distributions of the teacher: softmax(hidden weight^T)."""

    hidden: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]
    cross_entropy: float
    """Weight of the cross entropy added to the KL divergence."""


class LayerPass(NamedTuple):
    """Input and output of one of the teacher's layers."""

    given: Float[Tensor, "tokens hidden"]
    """Its input."""
    attended: Float[Tensor, "tokens hidden"]
    """What its attention adds to the input."""
    added: Float[Tensor, "tokens hidden"]
    """What the whole layer adds to the input."""


@final
class Teacher:
    """A frozen model without its MTP modules, with activations of `dtype`."""

    def __init__(self, model: Transformer, dtype: torch.dtype, *, cross_entropy: float) -> None:
        model.mtp = nn.ModuleList()
        self.model = model.requires_grad_(False)
        self._dtype = dtype
        self._cross_entropy = cross_entropy

    @torch.no_grad()
    def head(
        self,
        ids: Int[Tensor, "tokens"],
        positions: Int[Tensor, "tokens"],
        attention: AttentionBackend,
    ) -> TeacherHead:
        """Its next-token distributions after each of `ids`."""
        hidden = self.model(ids, positions, attention, dtype=self._dtype)
        return TeacherHead(hidden, self.model.head_weight(0), self._cross_entropy)

    @torch.no_grad()
    def layers(
        self,
        ids: Int[Tensor, "tokens"],
        positions: Int[Tensor, "tokens"],
        attention: AttentionBackend,
    ) -> Iterator[LayerPass]:
        """Input and output of layer after layer over `ids`."""
        x = self.model.embed_tokens(ids).to(self._dtype)
        tables = self.model.rotary(positions)
        for number, layer in enumerate(layers_of(self.model)):
            rope = self.model.rotary.of(number, tables)
            attended = layer.self_attn(layer.input_layernorm(x), rope, attention)
            middle = x + attended
            moved = layer.mlp(layer.post_attention_layernorm(middle))
            yield LayerPass(x, attended, attended + moved)
            x = middle + moved


def layers_of(model: Transformer) -> list[DecoderLayer]:
    """The decoder layers of `model` without MTP modules."""
    return [layer for layer in model.layers if isinstance(layer, DecoderLayer)]
