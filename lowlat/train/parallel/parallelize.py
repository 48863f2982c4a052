"""Parallelisation of a model over a process mesh: shards of every parameter, joined activations,
FSDP2; and the gradients, norms and full tensors of the shards.

On a mesh of one process nothing changes and every shard is the parameter itself.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowlat.model.block import DecoderLayer
from lowlat.model.moe import Gate
from lowlat.model.replace_modules import replace_modules
from lowlat.model.transformer import Transformer
from lowlat.train.layers.fp8 import Fp8Experts
from lowlat.train.layers.stacked_experts import StackedExperts
from lowlat.train.parallel import tensor
from lowlat.train.parallel.expert import ExpertParallelExperts
from lowlat.train.parallel.fsdp import apply_fsdp
from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.pipeline_gather import AXIS as PIPELINE
from lowlat.train.parallel.pipeline_gather import gather_along_pipeline
from lowlat.train.parallel.sharding import Shard, Sharding

BUCKET_BYTES = 2**26
"""Gradients are all-reduced in buckets of about this size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardedParameter:
    """One parameter of a parallelized model."""

    name: str
    """Its name in the full model."""
    parameter: nn.Parameter
    """The model's parameter, which accumulates the gradient."""
    local: nn.Parameter
    """This process's shard as plain memory, which the optimizer updates: `parameter` itself, or the
    shard that FSDP2 holds between uses.
    """
    sharding: Sharding
    """Which part of the full tensor the shard is."""
    reduce_axes: tuple[str, ...]
    """Axes over which its gradient is summed once per step; FSDP2 sums over its own."""


@final
class ShardedParameters:
    """All parameters of a model that this process has a part of, in the model's order."""

    def __init__(
        self,
        mesh: ProcessMesh,
        parameters: list[ShardedParameter],
        copies: Collection[str] = frozenset(),
    ) -> None:
        """`copies`: names of those counted as another process's, see `PipelinePasses`."""
        self.mesh = mesh
        self.parameters = parameters
        self.copies = copies
        self._by_name = {param.name: param for param in parameters}

    def sharding(self, name: str) -> Sharding:
        """How the parameter `name` is sharded."""
        return self._by_name[name].sharding

    def reduce_gradients(self) -> None:
        """All-reduce the gradients of the backward passes, and set the gradient of every shard."""
        for param in self.parameters:
            gradient = param.parameter.grad
            if param.local is not param.parameter:
                param.local.grad = None if gradient is None else _local(gradient)
        with_gradients = [param for param in self.parameters if param.local.grad is not None]
        by_axes = sorted(with_gradients, key=lambda param: param.reduce_axes)
        for axes, group in groupby(by_axes, key=lambda param: param.reduce_axes):
            gradients = [param.local.grad for param in group if param.local.grad is not None]
            for axis in axes:
                if self.mesh.size(axis) > 1:
                    _sum_in_place(gradients, self.mesh.group(axis))

    def gradient_norm(self, names: Iterable[str]) -> Tensor:
        """The norm of the full gradients of the parameters `names` here and in the other processes
        of the pipeline, each counted once.
        """
        by_axes: dict[tuple[str, ...], list[Tensor]] = {}
        for param in map(self._by_name.__getitem__, names):
            if param.local.grad is not None and param.name not in self.copies:
                by_axes.setdefault(param.sharding.axes, []).append(param.local.grad)
        norms = []
        for axes, gradients in by_axes.items():
            norm = torch.nn.utils.get_total_norm(gradients)
            norms.append(self.mesh.sum(norm.square(), axes).sqrt() if axes else norm)
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        if self.mesh.size(PIPELINE) == 1:
            return norm
        return self.mesh.sum(norm.square(), (PIPELINE,)).sqrt()

    def zero_grad(self) -> None:
        for param in self.parameters:
            param.parameter.grad = param.local.grad = None

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every full parameter of the model, one at a time; collective."""
        own = (
            (param.name, param.sharding.full(param.local.detach()))
            for param in self.parameters
            if param.name not in self.copies
        )
        return gather_along_pipeline(self.mesh, own)


def parallelize(
    model: Transformer,
    mesh: ProcessMesh,
    *,
    device: str,
    dtype: torch.dtype,
    roots: Sequence[nn.Module] = (),
    copies: Collection[str] = frozenset(),
) -> ShardedParameters:
    """Parallelize the full `model` in place: move this process's shards to `device` and add the
    communication.

    dtype: of the matrices that FSDP2 gathers, see `fsdp.apply_fsdp`; roots: modules whose forward
    passes are called, if not the model's; copies: see `ShardedParameters`. The config must be
    divisible (`tensor.check_divisible`).
    """
    shards = _shards(model, mesh)
    partial_gradients = _names_of_partial_gradients(model)
    shardings = {
        name: Sharding(mesh, parameter.shape, tuple(shards.get(name, ())))
        for name, parameter in model.named_parameters()
    }
    _take_shards(model, shardings, device)
    experts = {name for name, sharding in shardings.items() if "expert" in sharding.axes}
    if mesh.size("expert") > 1:
        _use_expert_parallelism(model, mesh.group("expert"))
    if mesh.size("tensor") > 1:
        for layer in _layers(model):
            tensor.join_activations(layer, mesh.group("tensor"))
    if mesh.size("fsdp") > 1:
        _use_fsdp(model, mesh, dtype, experts, roots or [model])
    parameters = [
        _sharded(name, parameter, shardings[name], name in experts, name in partial_gradients)
        for name, parameter in model.named_parameters()
    ]
    return ShardedParameters(mesh, parameters, copies)


def _shards(model: Transformer, mesh: ProcessMesh) -> dict[str, list[Shard]]:
    """Expert and tensor parallel shards of parameters, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[Shard]] = {}
    for module in model.modules():
        if isinstance(module, StackedExperts | Fp8Experts):
            for parameter in module.parameters():
                found.setdefault(names[id(parameter)], []).append(Shard(axis="expert", dim=0))
    if mesh.size("tensor") > 1:
        for layer in _layers(model):
            for parameter, shard in tensor.shards(layer):
                found.setdefault(names[id(parameter)], []).append(shard)
    return found


def _names_of_partial_gradients(model: Transformer) -> set[str]:
    partial_ids = {id(p) for layer in _layers(model) for p in tensor.partial_gradients(layer)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in partial_ids}


def _take_shards(model: nn.Module, shardings: dict[str, Sharding], device: str) -> None:
    """Replace every parameter by a copy of this process's shard on `device`."""
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = shardings[f"{prefix}.{key}" if prefix else key].local(parameter.detach())
            own = own.to(device, copy=True, memory_format=torch.contiguous_format)
            setattr(module, key, nn.Parameter(own, requires_grad=parameter.requires_grad))
    model.to(device)  # buffers


def _use_expert_parallelism(model: Transformer, group: dist.ProcessGroup) -> None:
    """Dispatch tokens to the experts, of which `model` holds this process's shard only."""
    replace_modules(
        model,
        lambda _path, module: (
            ExpertParallelExperts(module, group)
            if isinstance(module, StackedExperts | Fp8Experts)
            else None
        ),
    )


def _use_fsdp(
    model: Transformer,
    mesh: ProcessMesh,
    dtype: torch.dtype,
    experts: set[str],
    roots: Sequence[nn.Module],
) -> None:
    """FSDP2 around all parameters but routing biases, which every process updates by hand."""
    ignored = {
        module.e_score_correction_bias
        for module in model.modules()
        if isinstance(module, Gate) and module.e_score_correction_bias is not None
    }
    expert_mesh = None
    if experts and mesh.size("expert_fsdp") > 1:
        expert_mesh = mesh.device_mesh("expert_replicate", "expert_fsdp")
    elif experts:
        ignored |= {p for name, p in model.named_parameters() if name in experts}
    weights = mesh.device_mesh("replicate", "fsdp")
    apply_fsdp(model, roots, weights, expert_mesh=expert_mesh, dtype=dtype, ignored=ignored)


def _sharded(
    name: str, parameter: nn.Parameter, sharding: Sharding, is_expert: bool, is_partial: bool
) -> ShardedParameter:
    shards = sharding.shards
    reduce_axes = ("expert_replicate",) if is_expert else ("replicate",)
    local = parameter
    if isinstance(parameter, DTensor):
        shards = (*shards, Shard(axis="expert_fsdp" if is_expert else "fsdp", dim=0))
        reduce_axes = ()
        local = nn.Parameter(_local(parameter.detach()), requires_grad=parameter.requires_grad)
    if is_partial:
        reduce_axes = (*reduce_axes, "tensor")
    return ShardedParameter(
        name=name,
        parameter=parameter,
        local=local,
        sharding=Sharding(sharding.mesh, sharding.shape, shards),
        reduce_axes=reduce_axes,
    )


def _layers(model: nn.Module) -> list[DecoderLayer]:
    return [module for module in model.modules() if isinstance(module, DecoderLayer)]


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor that FSDP2 divides."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_in_place(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace tensors by their sums over `group`, in buckets of several tensors."""
    bucket: list[Tensor] = []
    size = 0
    for index, one in enumerate(tensors):
        bucket.append(one)
        size += one.nbytes
        if size >= BUCKET_BYTES or index == len(tensors) - 1:
            flat = torch.cat([part.flatten() for part in bucket])
            dist.all_reduce(flat, group=group)
            sums = flat.split([part.numel() for part in bucket])
            for part, total in zip(bucket, sums, strict=True):
                part.copy_(total.view_as(part))
            bucket, size = [], 0
