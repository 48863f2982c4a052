"""LoRA adapters at inference (multi-LoRA): projections with the low-rank updates of several
adapters; each sequence of a batch uses one or none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.model.linear import Linear
from lowlat.model.replace_modules import adopt, replace_modules

NO_ADAPTER = 0
"""The lora_int_id of the base model; those of adapters begin at 1, as in vLLM."""


@dataclass(frozen=True, slots=True)
class LowRankUpdate:
    """The update of a projection by an adapter: y += (x A^T) B^T, in fp32, B with the scaling."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes


@dataclass(slots=True)
class SelectedAdapter:
    """The adapter that a forward pass in PyTorch uses."""

    lora_int_id: int = NO_ADAPTER


class LoraLinear(Linear):
    """Linear with an update per adapter, None where an adapter has none; `selected` chooses one.

    The native kernels read `updates`, and choose by sequence.
    """

    def __init__(
        self, linear: Linear, updates: Sequence[LowRankUpdate | None], selected: SelectedAdapter
    ) -> None:
        adopt(self, linear)
        self.updates = tuple(updates)
        self.selected = selected

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out = F.linear(x, super().dense_weight(x.dtype), bias)
        update = self._update()
        if update is None:
            return out
        inner = F.linear(x, update.a.to(x.dtype))
        return out + F.linear(inner, update.b.to(x.dtype))

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight plus the selected adapter's update."""
        weight, update = super().dense_weight(dtype), self._update()
        if update is None:
            return weight
        return weight + (update.b @ update.a).to(dtype)

    @property
    def update_bytes(self) -> int:
        """Bytes of the updates of all adapters."""
        return sum(update.nbytes for update in self.updates if update is not None)

    def _update(self) -> LowRankUpdate | None:
        number = self.selected.lora_int_id
        return None if number == NO_ADAPTER else self.updates[number - 1]


def add_adapters(
    model: nn.Module, adapters: Sequence[Mapping[str, LowRankUpdate]]
) -> SelectedAdapter:
    """Replace the projections that `adapters` update, by path; adapter i has lora_int_id i + 1.

    Returns the selection that the replaced projections share.
    """
    selected = SelectedAdapter()

    def with_updates(path: str, module: nn.Module) -> nn.Module | None:
        found = [adapter.get(path) for adapter in adapters]
        if not isinstance(module, Linear) or not any(found):
            return None
        rows, device = module.part, module.weight.device
        moved = [own and LowRankUpdate(own.a.to(device), own.b[rows].to(device)) for own in found]
        return LoraLinear(module, moved, selected)

    replace_modules(model, with_updates)
    return selected
