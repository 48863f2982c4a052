"""bf16 weights that rollouts and training share, rounded in place from the trainer's fp32 master
weights after every update; low-rank updates (LoRA) are merged.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.checkpoint.mapping import ROUTER_BIAS
from lowlat.model.transformer import Transformer
from lowlat.train.layers.stacked_experts import unstacked
from lowlat.train.recipe.schema import LoraConfig
from lowlat.train.step.lora import is_lora_parameter, merged


class PolicyWeights:
    """One bf16 tensor per parameter of `trained`; those of routed experts are stacked.

    A frozen bf16 weight without an update is the trainer's own tensor.
    """

    def __init__(self, trained: Transformer, lora: LoraConfig | None = None) -> None:
        self.config = trained.config
        self._masters = dict(trained.named_parameters())
        self._lora = lora
        self.tensors: dict[str, Tensor] = {}
        with torch.no_grad():
            for name, value in self._values(""):
                self.tensors[name] = value.to(_dtype(name)).contiguous()
        masters = {tensor.data_ptr() for tensor in self._masters.values()}
        shared = {n for n, tensor in self.tensors.items() if tensor.data_ptr() in masters}
        self._rounded = self.tensors.keys() - shared

    def new_model(self) -> Transformer:
        """A model for the engine over these tensors, without copies."""
        with torch.device("meta"):
            model = Transformer(self.config, dtype=torch.bfloat16)
        model.load_state_dict(dict(unstacked(self.tensors)), assign=True)
        return model.requires_grad_(False)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the master weights into the tensors, in place."""
        for name, value in self._values(""):
            if name in self._rounded:
                self.tensors[name].copy_(value)

    @torch.enable_grad()
    def differentiable(self, prefix: str, parts: tuple[str, ...] = ("",)) -> dict[str, Tensor]:
        """The weights whose names begin with `prefix` and one of `parts`, by the rest of their
        names, for `torch.func.functional_call`: values of the shared tensors, gradients to the
        master weights.

        Norms, biases and gates, which compute in fp32, come as fp32.
        """
        found = {}
        for name, master in self._values(*(prefix + part for part in parts)):
            own = self.tensors[name]
            own = own.float() if own.ndim < 2 or name.endswith("gate.weight") else own
            value = substituted(own, master) if master.requires_grad else own
            found[name.removeprefix(prefix)] = value
        return found

    def master(self, name: str) -> Tensor | None:
        """The master weight `name`, or None if it is frozen."""
        master = self._masters[name]
        return master if master.requires_grad else None

    def _values(self, *prefixes: str) -> Iterator[tuple[str, Tensor]]:
        """Parameters of a model without LoRA, as functions of the master weights."""
        own = {name: p for name, p in self._masters.items() if name.startswith(prefixes)}
        if self._lora is None or not any(map(is_lora_parameter, own)):
            return iter(own.items())
        return merged(own, self._lora)


def substituted(value: Float[Tensor, "*shape"], computed: Float[Tensor, "*shape"]) -> Tensor:
    """`value` in the forward pass, with the gradient of `computed` (straight-through)."""
    out = _Substituted.apply(value, computed)
    assert isinstance(out, Tensor)
    return out


class _Substituted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, computed: Tensor) -> Tensor:
        ctx.dtype = computed.dtype
        return value.view_as(value)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[None, Tensor]:
        return None, grad.to(ctx.dtype)


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16
