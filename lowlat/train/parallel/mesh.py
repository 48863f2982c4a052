"""Process mesh of a training run: data, FSDP, expert, tensor, pipeline and context parallelism as
axes of PyTorch device meshes, and reductions over them.

A single process is a mesh of size 1 on every axis, on which all operations are trivial.
"""

from collections.abc import Sequence
from typing import TypeVar, cast, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lowlat.train.recipe.schema import ParallelConfig
from lowlat.utils.errors import UserError

BATCH_AXES = ("data", "fsdp")
"""Axes whose processes have different sequences of a batch."""
TOKEN_AXES = ("data", "context", "fsdp")
"""Axes whose processes have different tokens of a batch."""
ALL_AXES = ("pipeline", "data", "context", "fsdp", "tensor")
"""Axes that together hold every process."""

T = TypeVar("T")


@final
class ProcessMesh:
    """Processes arranged along axes; ranks count with the last axis fastest. The world size is the
    product of all axes.

    The mesh is (pipeline, data, context, fsdp, tensor). Two views regroup the same processes:

    (pipeline, replicate, fsdp, tensor)
        replicate: the data and context processes, which hold the same weights;
    (pipeline, expert_replicate, expert_fsdp, expert, tensor)
        expert: those among which routed experts are divided, neighbours in (data, context, fsdp);
        expert_fsdp: those that shard the same experts further, as fsdp does with other weights;
        expert_replicate: those that hold the same weights of the same experts.
    """

    def __init__(self, parallel: ParallelConfig | None = None, device: str = "cpu") -> None:
        """Collective over all processes. `device` is that of communicated tensors.

        Raises UserError for sizes that do not fit one another.
        """
        self.parallel = parallel = parallel or ParallelConfig()
        self.device = device
        self.world_size = parallel.processes
        self.rank = dist.get_rank() if self.world_size > 1 else 0
        """This process, from 0."""
        self.is_main_process = self.rank == 0
        """Whether this is rank 0, which writes logs, checkpoints and models."""
        views = view_sizes(parallel)
        self._sizes = {name: size for view in views for name, size in view.items()}
        self._meshes = [mesh for view in views if (mesh := _device_mesh(view, device)) is not None]
        fsdp = self.size("fsdp")
        self.data_parallel_size = self.size("data") * fsdp
        """Number of parts the sequences of a batch are divided into."""
        self.data_parallel_rank = self.local_rank("data") * fsdp + self.local_rank("fsdp")
        """Which of these parts this process has."""

    def size(self, axis: str) -> int:
        """Number of processes along `axis`."""
        return self._sizes[axis]

    def local_rank(self, axis: str) -> int:
        """Coordinate of this process along `axis`."""
        return self._containing(axis).get_local_rank(axis) if self.size(axis) > 1 else 0

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of this process along `axis`, whose size must exceed 1."""
        return self._containing(axis).get_group(axis)

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The device mesh of those `axes` whose size exceeds 1; at least one must."""
        names = tuple(axis for axis in axes if self.size(axis) > 1)
        return self._containing(*names)[names]

    def sum(self, tensor: Tensor, axes: Sequence[str]) -> Tensor:
        """All-reduced sum of `tensor` over the processes along `axes`; `tensor` itself for one
        process.
        """
        return self._all_reduced(tensor, axes, dist.ReduceOp.SUM)

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds in any process."""
        value = torch.tensor(int(flag))
        return bool(self._all_reduced(value, ALL_AXES, dist.ReduceOp.MAX).item())

    def broadcast(self, value: int) -> int:
        """`value` of rank 0."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def gather(self, value: T, axis: str) -> list[T]:
        """The picklable `value` of every process along `axis`, in their order (all-gather)."""
        if self.size(axis) == 1:
            return [value]
        values: list[T | None] = [None] * self.size(axis)
        dist.all_gather_object(values, value, group=self.group(axis))
        return cast(list[T], values)

    def batch_shard(self, first: int, rows: int) -> tuple[int, int]:
        """First sequence and number of sequences of this process's part of `rows` sequences from
        `first`; `rows` is a multiple of `data_parallel_size`.
        """
        count = rows // self.data_parallel_size
        return first + self.data_parallel_rank * count, count

    def share(self, count: int) -> range:
        """This process's part of `count` items, which differs by at most one item from others."""
        rank, size = self.data_parallel_rank, self.data_parallel_size
        return range(count * rank // size, count * (rank + 1) // size)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _all_reduced(
        self, tensor: Tensor, axes: Sequence[str], op: dist.ReduceOp.RedOpType
    ) -> Tensor:
        axes = [axis for axis in axes if self.size(axis) > 1]
        if not axes:
            return tensor
        tensor = tensor.clone()
        for axis in axes:
            dist.all_reduce(tensor, op, group=self.group(axis))
        return tensor

    def _containing(self, *axes: str) -> DeviceMesh:
        for mesh in self._meshes:
            if set(axes) <= set(mesh.mesh_dim_names or ()):
                return mesh
        raise AssertionError(f"no device mesh has the axes {axes}")


def view_sizes(parallel: ParallelConfig) -> list[dict[str, int]]:
    """Sizes of the axes in each view of the processes."""
    replicate = parallel.data * parallel.context
    expert_fsdp, expert_replicate = expert_sizes(parallel, replicate)
    ends = {"pipeline": parallel.pipeline}, {"tensor": parallel.tensor}
    base = {"data": parallel.data, "context": parallel.context, "fsdp": parallel.fsdp}
    weights = {"replicate": replicate, "fsdp": parallel.fsdp}
    expert = {
        "expert_replicate": expert_replicate,
        "expert_fsdp": expert_fsdp,
        "expert": parallel.expert,
    }
    return [ends[0] | view | ends[1] for view in (base, weights, expert)]


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


def _device_mesh(view: dict[str, int], device: str) -> DeviceMesh | None:
    axes = {name: size for name, size in view.items() if size > 1}
    if not axes:
        return None
    return init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
