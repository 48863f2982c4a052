"""FSDP2 (fully sharded data parallelism): weights, gradients and optimizer state are sharded, and
the weights of a layer are all-gathered while it runs.

Gradients are summed, not
averaged: losses are already divided by the targets of the global batch.
"""

from collections.abc import Sequence
from types import UnionType

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lowlat.model.block import DecoderLayer
from lowlat.model.moe import MLP
from lowlat.model.mtp import MTPModule
from lowlat.train.layers.fp8 import Fp8Linear
from lowlat.train.layers.stacked_experts import StackedExperts
from lowlat.train.parallel.expert import ExpertParallelExperts


def apply_fsdp(
    model: nn.Module,
    roots: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    expert_mesh: DeviceMesh | None,
    dtype: torch.dtype,
    ignored: set[nn.Parameter],
) -> None:
    """Shard `model` over `mesh` (fsdp, or replicate and fsdp: HSDP), and expert-parallel experts
    over `expert_mesh`.

    roots: modules whose forward is called. dtype: that of activations; modules with matrices only
    are all-gathered in it. Parameters in `ignored` are not sharded.
    """
    matrices = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    # A pipeline stage stays gathered from the first micro-batch of a step to the last.
    reshards = list(roots) == [model]
    for module in _of(model, MLP | StackedExperts | ExpertParallelExperts):
        own = expert_mesh if isinstance(module, ExpertParallelExperts) else mesh
        if own is not None and not ignored.issuperset(module.parameters()):
            policy = exact if _quantizes(module) else matrices
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
    """Whether the next backward passes all-reduce gradients over replicas; without, FSDP2
    accumulates them locally. Only the last micro-batch of a step all-reduces.
    """
    for module in _of(model, FSDPModule):
        module.set_requires_all_reduce(wanted, recurse=False)


def _quantizes(module: nn.Module) -> bool:
    """Whether `module` quantizes its fp32 master weights to fp8 blocks."""
    if isinstance(module, ExpertParallelExperts):
        return module.is_fp8
    return any(isinstance(part, Fp8Linear) for part in module.modules())


def _of(model: nn.Module, kind: type | UnionType) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]
