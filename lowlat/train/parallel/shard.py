"""FSDP2 over a model: weights, gradients and optimiser divided, a layer's weights gathered while it
runs.

Owns which modules are gathered together and in which dtype. Gradients are summed, not averaged:
losses are divided by the targets of the global batch already.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lowlat.model.block import DecoderLayer
from lowlat.model.linear import Linear
from lowlat.model.moe import MLP, StackedExperts
from lowlat.model.mtp import MTPModule
from lowlat.ops.grouped import stacked_experts
from lowlat.train.parallel.expert import DividedExperts

ExpertModule = StackedExperts | DividedExperts


def shard(
    model: nn.Module,
    roots: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    expert_mesh: DeviceMesh | None,
    dtype: torch.dtype,
    ignored: set[nn.Parameter],
) -> None:
    """Divide `model`, of which the forward passes of `roots` are called, over `mesh` (fsdp, or
    replicate and fsdp), divided experts over `expert_mesh`.

    dtype: of activations; modules that hold nothing but matrices, which are cast to it where they
    are used, are gathered in it. Parameters in `ignored` stay as they are.
    """
    matrices = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    # A stage of a pipeline stays gathered from the first micro-batch of a step to the last.
    reshards = list(roots) == [model]
    for module in _matrices(model):
        own = expert_mesh if isinstance(module, DividedExperts) else mesh
        if own is not None and not ignored.issuperset(module.parameters()):
            policy = exact if _quantises(module) else matrices
            fully_shard(module, mesh=own, mp_policy=policy, reshard_after_forward=reshards)
    for module in [*_of(model, DecoderLayer), *_of(model, MTPModule)]:
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=exact,
            ignored_params=ignored,
            reshard_after_forward=reshards,
        )
    for root in roots:
        # The head is used after the model's own forward pass, so the root stays gathered.
        fully_shard(
            root, mesh=mesh, mp_policy=exact, ignored_params=ignored, reshard_after_forward=False
        )
        for module in _of(root, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sum_over_replicas(model: nn.Module, wanted: bool) -> None:
    """Whether backward passes that follow sum gradients over replicas; if not, FSDP2 keeps them to
    itself until one does. Of the micro-batches of a step, the last one needs to.
    """
    for module in _of(model, FSDPModule):
        module.set_requires_all_reduce(wanted, recurse=False)


def _matrices(model: nn.Module) -> Iterator[nn.Module]:
    for module in list(model.modules()):
        if isinstance(module, MLP | ExpertModule):
            yield module


def _quantises(module: nn.Module) -> bool:
    """Whether the products of `module` take fp8 blocks from its fp32 weights."""
    if isinstance(module, DividedExperts):
        return module.products is not stacked_experts
    return any(isinstance(part, Linear) and part.fp8 is not None for part in module.modules())


def _of(model: nn.Module, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]
