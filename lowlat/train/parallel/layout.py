"""A model laid out over a team: every parameter cut into pieces, activations joined, FSDP2 around.

Owns which parameter lies where, the gradients of pieces, and how whole tensors come of them. With a
team of one nothing is changed and every piece is the parameter itself.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import final, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lowlat.model.block import DecoderLayer
from lowlat.model.moe import Gate, MoE, StackedExperts
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8_experts import fp8_stacked_experts
from lowlat.ops.grouped import stacked_experts
from lowlat.train.parallel import tensor
from lowlat.train.parallel.division import Cut, Division
from lowlat.train.parallel.expert import DividedExperts
from lowlat.train.parallel.relay import AXIS as PIPELINE
from lowlat.train.parallel.relay import along_pipeline
from lowlat.train.parallel.shard import shard
from lowlat.train.parallel.team import Team
from lowlat.train.step.fp8 import Fp8Experts

ExpertsOfMoE = StackedExperts | Fp8Experts
"""Routed experts whose parameters have one of them per entry of dimension 0."""
BUCKET_BYTES = 2**26
"""Gradients are summed over processes in pieces of about this size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Laid:
    """One parameter of a model that is laid out."""

    name: str
    """Its name in the whole model."""
    parameter: nn.Parameter
    """The model's own, which takes the gradient."""
    piece: nn.Parameter
    """This process's part as plain memory, which the optimiser moves: `parameter` itself, or what
    FSDP2 keeps of it between uses.
    """
    division: Division
    """What of the whole the piece is."""
    summed_over: tuple[str, ...]
    """Axes over which its gradient is summed once per step; FSDP2 sums over its own."""


@final
class Layout:
    """All parameters of a model that this process has a part of, in the model's order."""

    def __init__(self, team: Team, laid: list[Laid], copies: Collection[str] = frozenset()) -> None:
        """`copies`: names of those that count as another process's, see `PipelinePasses`."""
        self.team = team
        self.laid = laid
        self.copies = copies
        self._by_name = {one.name: one for one in laid}

    @classmethod
    def undivided(cls, model: nn.Module) -> "Layout":
        """The whole of any module in one process."""
        team = Team()
        return cls(
            team,
            [
                _laid(name, parameter, Division(team, parameter.shape), False, False)
                for name, parameter in model.named_parameters()
            ],
        )

    def division(self, name: str) -> Division:
        """How the parameter `name` is divided."""
        return self._by_name[name].division

    def take_gradients(self) -> None:
        """Sum what backward passes left over the processes, and give every piece its gradient."""
        for laid in self.laid:
            if laid.piece is not laid.parameter:
                laid.piece.grad = _local(laid.parameter.grad)
        with_gradients = [laid for laid in self.laid if laid.piece.grad is not None]
        by_axes = sorted(with_gradients, key=lambda laid: laid.summed_over)
        for axes, group in groupby(by_axes, key=lambda laid: laid.summed_over):
            gradients = [laid.piece.grad for laid in group if laid.piece.grad is not None]
            for axis in axes:
                if self.team.size(axis) > 1:
                    _sum_in_place(gradients, self.team.group(axis))

    def gradient_norm(self, names: Iterable[str]) -> Tensor:
        """The norm of the whole gradients of the parameters `names` and of those that other
        processes of the pipeline name, each counted once.
        """
        by_axes: dict[tuple[str, ...], list[Tensor]] = {}
        for laid in map(self._by_name.__getitem__, names):
            if laid.piece.grad is not None and laid.name not in self.copies:
                by_axes.setdefault(laid.division.axes, []).append(laid.piece.grad)
        norms = []
        for axes, gradients in by_axes.items():
            norm = torch.nn.utils.get_total_norm(gradients)
            norms.append(self.team.sum(norm.square(), axes).sqrt() if axes else norm)
        norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
        if self.team.size(PIPELINE) == 1:
            return norm
        return self.team.sum(norm.square(), (PIPELINE,)).sqrt()

    def forget_gradients(self) -> None:
        for laid in self.laid:
            laid.parameter.grad = laid.piece.grad = None

    def whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of the model whole, one after the other; collective."""
        yield from along_pipeline(self.team, self._own_whole())

    def _own_whole(self) -> Iterator[tuple[str, Tensor]]:
        for laid in self.laid:
            if laid.name not in self.copies:
                yield laid.name, laid.division.whole(laid.piece.detach())


def lay_out(
    model: Transformer,
    team: Team | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    roots: Sequence[nn.Module] = (),
    copies: Collection[str] = frozenset(),
) -> Layout:
    """Bring this process's part of `model` to `device` and let the model compute with it.

    dtype: of the matrices that FSDP2 gathers, see `shard.shard`; roots: modules whose forward
    passes are called, where that is not the model's; copies: see `Layout`. The config must be
    divisible (`tensor.check_divisible`).
    """
    team = team or Team()
    cuts = _cuts(model, team)
    partial_gradients = _names_of_partial_gradients(model)
    divisions = {
        name: Division(team, parameter.shape, tuple(cuts.get(name, ())))
        for name, parameter in model.named_parameters()
    }
    _keep_own(model, divisions, device)
    experts = {name for name, found in divisions.items() if "expert" in found.axes}
    _divide_experts(model, team)
    if team.size("tensor") > 1:
        for layer in _layers(model):
            tensor.join_activations(layer, team.group("tensor"))
    _shard(model, team, dtype, experts, roots or [model])
    laid = [
        _laid(name, parameter, divisions[name], name in experts, name in partial_gradients)
        for name, parameter in model.named_parameters()
    ]
    return Layout(team, laid, copies)


def _cuts(model: Transformer, team: Team) -> dict[str, list[Cut]]:
    """Cuts of parameters, by name, without those of FSDP2."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, list[Cut]] = {}
    for module in model.modules():
        if isinstance(module, ExpertsOfMoE):
            for parameter in module.parameters():
                found.setdefault(names[id(parameter)], []).append(Cut(axis="expert", dim=0))
    if team.size("tensor") > 1:
        for layer in _layers(model):
            for parameter, cut in tensor.cuts(layer):
                found.setdefault(names[id(parameter)], []).append(cut)
    return found


def _names_of_partial_gradients(model: Transformer) -> set[str]:
    partial_ids = {id(p) for layer in _layers(model) for p in tensor.partial_gradients(layer)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in partial_ids}


def _keep_own(model: nn.Module, divisions: dict[str, Division], device: str) -> None:
    """Replace every parameter by this process's piece of it, as memory of its own on `device`."""
    for prefix, module in model.named_modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            own = divisions[f"{prefix}.{key}" if prefix else key].own(parameter.detach())
            own = own.to(device, copy=True, memory_format=torch.contiguous_format)
            setattr(module, key, nn.Parameter(own, requires_grad=parameter.requires_grad))
    model.to(device)  # tables that are no parameters


def _divide_experts(model: Transformer, team: Team) -> None:
    """Let tokens travel to the experts, of which every process has its own by now."""
    if team.size("expert") == 1:
        return
    for module in list(model.modules()):
        if isinstance(module, MoE) and isinstance(module.experts, ExpertsOfMoE):
            experts = module.experts
            products = (
                partial(fp8_stacked_experts, formats=experts.formats)
                if isinstance(experts, Fp8Experts)
                else stacked_experts
            )
            divided = DividedExperts(experts, team.group("expert"), products)
            module.add_module("experts", divided)


def _shard(
    model: Transformer,
    team: Team,
    dtype: torch.dtype,
    experts: set[str],
    roots: Sequence[nn.Module],
) -> None:
    """FSDP2 around all but routing biases, which are moved by hand in every process."""
    if team.size("fsdp") == 1:
        return
    ignored = {
        module.e_score_correction_bias
        for module in model.modules()
        if isinstance(module, Gate) and module.e_score_correction_bias is not None
    }
    expert_mesh = None
    if experts and team.size("expert_fsdp") > 1:
        expert_mesh = team.mesh("expert_replicate", "expert_fsdp")
    elif experts:
        ignored |= {p for name, p in model.named_parameters() if name in experts}
    mesh = team.mesh("replicate", "fsdp")
    shard(model, roots, mesh, expert_mesh=expert_mesh, dtype=dtype, ignored=ignored)


def _laid(
    name: str, parameter: nn.Parameter, division: Division, is_expert: bool, is_partial: bool
) -> Laid:
    cuts = division.cuts
    summed_over = ("expert_replicate",) if is_expert else ("replicate",)
    piece = parameter
    if isinstance(parameter, DTensor):
        cuts = (*cuts, Cut(axis="expert_fsdp" if is_expert else "fsdp", dim=0))
        summed_over = ()
        piece = nn.Parameter(_local(parameter.detach()), requires_grad=parameter.requires_grad)
    if is_partial:
        summed_over = (*summed_over, "tensor")
    return Laid(
        name=name,
        parameter=parameter,
        piece=piece,
        division=Division(division.team, division.shape, cuts),
        summed_over=summed_over,
    )


def _layers(model: nn.Module) -> list[DecoderLayer]:
    return [module for module in model.modules() if isinstance(module, DecoderLayer)]


@overload
def _local(held: Tensor) -> Tensor: ...
@overload
def _local(held: None) -> None: ...
def _local(held: Tensor | None) -> Tensor | None:
    """What this process has of a tensor that FSDP2 divides."""
    return held.to_local() if isinstance(held, DTensor) else held


def _sum_in_place(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Replace tensors by their sums over `group`, several in one message."""
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
