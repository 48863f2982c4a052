"""The processes of a run and this one's place among them.

Owns the mesh (which processes divide what) and sums over parts of it. A process alone is a team of
one, for which everything here is trivial; nothing here knows of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lowlat.train.recipe.schema import ParallelConfig
from lowlat.utils.errors import UserError

ROWS = ("data", "fsdp")
"""Axes whose processes have different rows of a batch."""
TOKENS = ("data", "context", "fsdp")
"""Axes whose processes have different tokens of a batch."""
ALL = ("pipeline", "data", "context", "fsdp", "tensor")
"""Axes that together hold every process."""


@final
class Team:
    """Processes arranged along axes; ranks count with the last axis fastest.

    (pipeline, data, context, fsdp, tensor) is the mesh; the same processes are also seen as

    (pipeline, replicate, fsdp, tensor)
        replicate: the data and context processes, which hold the same weights;
    (pipeline, expert_replicate, expert_fsdp, expert, tensor)
        expert: those among which routed experts are divided, neighbours in (data, context, fsdp);
        expert_fsdp: those that divide the same experts further, as fsdp does with other weights;
        expert_replicate: those that hold the same weights of the same experts.
    """

    def __init__(self, parallel: ParallelConfig | None = None, device: str = "cpu") -> None:
        """Collective over all processes unless alone. `device` is that of tensors sent.

        Raises UserError for sizes that do not fit one another.
        """
        self.parallel = parallel = parallel or ParallelConfig()
        self.device = device
        self.rank = dist.get_rank() if parallel.processes > 1 else 0
        """This process, from 0."""
        views = view_sizes(parallel)
        self._sizes = {name: size for view in views for name, size in view.items()}
        self._meshes = [mesh for view in views if (mesh := _mesh(view, device)) is not None]

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.parallel.processes

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the run leaves: logs, saves, models."""
        return self.rank == 0

    def size(self, axis: str) -> int:
        """Processes along `axis`."""
        return self._sizes[axis]

    def place(self, axis: str) -> int:
        """This process's place along `axis`."""
        return self._mesh(axis).get_local_rank(axis) if self.size(axis) > 1 else 0

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes along `axis` that this one is among; more than one."""
        return self._mesh(axis).get_group(axis)

    def mesh(self, *axes: str) -> DeviceMesh:
        """The mesh of those `axes` that have more than one process; at least one must."""
        names = tuple(axis for axis in axes if self.size(axis) > 1)
        return self._mesh(*names)[names]

    def sum(self, tensor: Tensor, axes: Sequence[str]) -> Tensor:
        """The sum of `tensor` over the processes along `axes`; itself where there is one."""
        return self._reduced(tensor, axes, dist.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        value = torch.tensor(int(flag))
        return bool(self._reduced(value, ALL, dist.ReduceOp.MAX).item())

    def from_first(self, value: int) -> int:
        """`value` of the first process."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value)
        dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def share(self, first: int, rows: int) -> "Share":
        """This process's part of rows first .. first + rows - 1, a multiple of `row_parts`."""
        count = rows // self.row_parts
        return Share(first=first + self.row_part * count, rows=count)

    @property
    def row_parts(self) -> int:
        """Parts that the rows of a batch are divided into."""
        return self.size("data") * self.size("fsdp")

    @property
    def row_part(self) -> int:
        """Which of them this process has."""
        return self.place("data") * self.size("fsdp") + self.place("fsdp")

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def _reduced(self, tensor: Tensor, axes: Sequence[str], op: dist.ReduceOp.RedOpType) -> Tensor:
        axes = [axis for axis in axes if self.size(axis) > 1]
        if not axes:
            return tensor
        tensor = tensor.clone()
        for axis in axes:
            dist.all_reduce(tensor, op, group=self.group(axis))
        return tensor

    def _mesh(self, *axes: str) -> DeviceMesh:
        for mesh in self._meshes:
            if set(axes) <= set(mesh.mesh_dim_names or ()):
                return mesh
        raise AssertionError(f"no mesh has the axes {axes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Rows of a global batch that belong to one process."""

    first: int
    rows: int


def view_sizes(parallel: ParallelConfig) -> list[dict[str, int]]:
    """Sizes of the axes in each view of the processes."""
    replicate = parallel.data * parallel.context
    expert_fsdp, expert_replicate = expert_sizes(parallel, replicate)
    ends = {"pipeline": parallel.pipeline}, {"tensor": parallel.tensor}
    base = {"data": parallel.data, "context": parallel.context, "fsdp": parallel.fsdp}
    held = {"replicate": replicate, "fsdp": parallel.fsdp}
    expert = {
        "expert_replicate": expert_replicate,
        "expert_fsdp": expert_fsdp,
        "expert": parallel.expert,
    }
    return [ends[0] | view | ends[1] for view in (base, held, expert)]


def expert_sizes(parallel: ParallelConfig, replicate: int) -> tuple[int, int]:
    """Sizes of expert_fsdp and expert_replicate. Raises UserError where experts do not fit."""
    fsdp, expert = parallel.fsdp, parallel.expert
    if fsdp % expert == 0:
        return fsdp // expert, replicate
    if expert % fsdp == 0 and replicate % (expert // fsdp) == 0:
        return 1, replicate // (expert // fsdp)
    raise UserError(
        f"parallel.expert {expert} does not fit fsdp {fsdp} and data x context {replicate}: it "
        "must divide fsdp, or be a multiple of it that divides fsdp x data x context"
    )


def _mesh(view: dict[str, int], device: str) -> DeviceMesh | None:
    axes = {name: size for name, size in view.items() if size > 1}
    if not axes:
        return None
    return init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
