"""AdamW and Muon over the parameters of a model. Owns which parameter is treated how, clipping,
and the optimiser's state by parameter name.
"""

from collections.abc import Iterable, Iterator, MutableMapping

import torch
from torch import Tensor, nn

from lowlat.model.linear import Embedding, Linear
from lowlat.model.moe import Gate
from lowlat.model.stacking import GATE_UP
from lowlat.model.transformer import Transformer
from lowlat.train.parallel.layout import Layout
from lowlat.train.parallel.relay import along_pipeline
from lowlat.train.recipe.schema import OptimizerConfig
from lowlat.train.step.muon import Muon

Named = list[tuple[str, nn.Parameter]]


class Optimizer:
    """One or two of torch's optimisers over all parameters that take gradients."""

    def __init__(
        self, model: nn.Module, table: OptimizerConfig, layout: Layout | None = None
    ) -> None:
        """`layout` says where the parameters of `model` are; without, in this process."""
        self._layout = layout or Layout.undivided(model)
        hidden, outer, plain = _groups(model, self._layout)
        self.max_grad_norm = table.max_grad_norm
        self._named = [*hidden, *outer, *plain]
        muon = hidden if table.name == "muon" else []
        decayed = outer if table.name == "muon" else [*hidden, *outer]
        groups = [
            {"params": [p for _, p in decayed], "weight_decay": table.weight_decay},
            {"params": [p for _, p in plain], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._adamw = (
            torch.optim.AdamW(groups, lr=0.0, betas=table.betas, eps=table.eps, fused=True)
            if groups
            else None
        )
        self._muon = (
            Muon(
                [p for _, p in muon],
                [self._layout.division(name) for name, _ in muon],
                [2 if name.endswith(GATE_UP) else 1 for name, _ in muon],
                momentum=table.momentum,
                weight_decay=table.weight_decay,
            )
            if muon
            else None
        )

    def step(self, learning_rate: float) -> float:
        """Clip, update, forget the gradients; the gradient norm before clipping.

        Nothing is updated where the norm is not finite.
        """
        self._layout.take_gradients()
        norm = self._layout.gradient_norm(name for name, _ in self._named)
        if norm.isfinite():
            parameters = [p for _, p in self._named]
            if 0 < self.max_grad_norm < norm:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
            for optimizer in self._optimizers():
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
        self.zero_grad()
        return norm.item()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._layout.forget_gradients()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The whole state, as ('exp_avg.layers.0.mlp.up_proj.weight', tensor), one tensor after the
        other; empty before the first step. Collective.
        """
        yield from along_pipeline(self._layout.team, self._own_tensors())

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for optimizer in self._optimizers():
            for name, parameter in self._named:
                if name in self._layout.copies:
                    continue
                division = self._layout.division(name)
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield f"{key}.{name}", value if value.ndim == 0 else division.whole(value)

    def load(self, tensors: MutableMapping[str, Tensor]) -> None:
        """Take what `tensors` gave out of a mapping, copying one after the other."""
        for optimizer in self._optimizers():
            keys = ("momentum",) if optimizer is self._muon else ADAMW_STATE
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, parameter in self._named:
                # What no gradient has reached yet has no state.
                if id(parameter) in own and f"{keys[0]}.{name}" in tensors:
                    division = self._layout.division(name)
                    own_state = optimizer.state[parameter]
                    for key in keys:
                        value = tensors.pop(f"{key}.{name}")
                        piece = value if value.ndim == 0 else division.own(value)
                        own_state[key] = piece.to(parameter.device, copy=True)

    def _optimizers(self) -> Iterable[torch.optim.Optimizer]:
        return [one for one in (self._adamw, self._muon) if one is not None]


ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps per parameter."""


def _groups(model: nn.Module, layout: Layout) -> tuple[Named, Named, Named]:
    """Hidden matrices, matrices at the ends (embedding, head, gates), vectors (norms, biases), of
    each what this process has.
    """
    hidden: Named = []
    outer: Named = []
    plain: Named = []
    ends = _ends(model)
    for laid in layout.laid:
        parameter = laid.parameter
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            plain.append((laid.name, laid.piece))
        else:
            (outer if id(parameter) in ends else hidden).append((laid.name, laid.piece))
    return hidden, outer, plain


def _ends(model: nn.Module) -> set[int]:
    """Identities of the matrices that face tokens or experts rather than hidden channels."""
    found = {id(m.weight) for m in model.modules() if isinstance(m, Embedding | Gate)}
    for module in model.modules():
        if isinstance(module, Transformer):
            heads = [module.lm_head, *(mtp.head for mtp in module.mtp)]
            found |= {id(head.weight) for head in heads if isinstance(head, Linear)}
    return found
