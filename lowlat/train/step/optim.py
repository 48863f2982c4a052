"""AdamW and Muon over the parameters of a model: parameter groups, gradient clipping, and optimizer
state by parameter name. Both update fp32 master weights in place.
"""

from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor, nn

from lowlat.model.indexer import HeadWeights
from lowlat.model.linear import Embedding, Linear
from lowlat.model.moe import Gate
from lowlat.model.transformer import Transformer
from lowlat.train.layers.stacked_experts import GATE_UP
from lowlat.train.parallel.parallelize import ShardedParameters
from lowlat.train.parallel.pipeline_gather import gather_along_pipeline
from lowlat.train.recipe.schema import OptimizerConfig
from lowlat.train.step.muon import Muon

Named = list[tuple[str, nn.Parameter]]


class Optimizer:
    """One or two torch optimizers over all trainable parameters."""

    def __init__(
        self, model: nn.Module, table: OptimizerConfig, sharded: ShardedParameters
    ) -> None:
        """`sharded` holds the shards of the parameters of `model`."""
        self._sharded = sharded
        hidden, outer, plain = _groups(model, self._sharded)
        self.max_grad_norm = table.max_grad_norm
        self._named = [*hidden, *outer, *plain]
        muon = hidden if table.name == "muon" else []
        decayed = outer if table.name == "muon" else [*hidden, *outer]
        groups = [
            {"params": [p for _, p in decayed], "weight_decay": table.weight_decay},
            {"params": [p for _, p in plain], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self._optimizers: list[torch.optim.Optimizer] = []
        if groups:
            self._optimizers.append(
                torch.optim.AdamW(groups, lr=0.0, betas=table.betas, eps=table.eps, fused=True)
            )
        if muon:
            self._optimizers.append(
                Muon(
                    [p for _, p in muon],
                    [self._sharded.sharding(name) for name, _ in muon],
                    [2 if name.endswith(GATE_UP) else 1 for name, _ in muon],
                    momentum=table.momentum,
                    weight_decay=table.weight_decay,
                )
            )

    def step(self, learning_rate: float) -> float:
        """Clip, update, zero the gradients; returns the gradient norm before clipping.

        Skips the update on a non-finite gradient norm (NaN, inf).
        """
        self._sharded.reduce_gradients()
        norm = self._sharded.gradient_norm(name for name, _ in self._named)
        if norm.isfinite():
            parameters = [p for _, p in self._named]
            if 0 < self.max_grad_norm < norm:
                # clip_grad_norm_ with the norm of all shards, computed above
                torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate
                optimizer.step()
        self.zero_grad()
        return norm.item()

    def zero_grad(self) -> None:
        self._sharded.zero_grad()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The full state, as ('exp_avg.layers.0.mlp.up_proj.weight', tensor), one tensor at a time;
        empty before the first step. Collective.
        """
        yield from gather_along_pipeline(self._sharded.mesh, self._own_tensors())

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for optimizer in self._optimizers:
            for name, parameter in self._named:
                if name in self._sharded.copies:
                    continue
                sharding = self._sharded.sharding(name)
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield f"{key}.{name}", value if value.ndim == 0 else sharding.full(value)

    def load(self, tensors: MutableMapping[str, Tensor]) -> None:
        """Load the state that `tensors` gave, popping one tensor at a time from the mapping."""
        for optimizer in self._optimizers:
            keys = ("momentum",) if isinstance(optimizer, Muon) else ADAMW_STATE
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, parameter in self._named:
                # Parameters without any gradient so far have no state.
                if id(parameter) in own and f"{keys[0]}.{name}" in tensors:
                    sharding = self._sharded.sharding(name)
                    own_state = optimizer.state[parameter]
                    for key in keys:
                        value = tensors.pop(f"{key}.{name}")
                        local = value if value.ndim == 0 else sharding.local(value)
                        own_state[key] = local.to(parameter.device, copy=True)


ADAMW_STATE = ("step", "exp_avg", "exp_avg_sq")
"""State of AdamW per parameter."""


def _groups(model: nn.Module, sharded: ShardedParameters) -> tuple[Named, Named, Named]:
    """Trainable shards of this process: hidden matrices, outer matrices (embedding, head, gates),
    and vectors (norms, biases), which have no weight decay.
    """
    hidden: Named = []
    outer: Named = []
    plain: Named = []
    ends = _ends(model)
    for param in sharded.parameters:
        parameter = param.parameter
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2:
            plain.append((param.name, param.local))
        else:
            (outer if id(parameter) in ends else hidden).append((param.name, param.local))
    return hidden, outer, plain


def _ends(model: nn.Module) -> set[int]:
    """Identities of the matrices of embedding, head, gates and indexers' head weights."""
    ends = Embedding | Gate | HeadWeights
    found = {id(m.weight) for m in model.modules() if isinstance(m, ends)}
    for module in model.modules():
        if isinstance(module, Transformer):
            heads = [module.lm_head, *(mtp.head for mtp in module.mtp)]
            found |= {id(head.weight) for head in heads if isinstance(head, Linear)}
    return found
