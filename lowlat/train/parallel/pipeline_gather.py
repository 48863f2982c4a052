"""Broadcast of named tensors along the pipeline: every process yields those of all stages.

A message is a JSON header and the tensor's memory.
"""

import json
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lowlat.train.parallel.mesh import ProcessMesh

AXIS = "pipeline"
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
}


def gather_along_pipeline(
    mesh: ProcessMesh, own: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of `own` of every process along the pipeline, process after process, in all of
    them. Collective: every process must exhaust the iterator.
    """
    if mesh.size(AXIS) == 1:
        yield from own
        return
    for source in range(mesh.size(AXIS)):
        if source == mesh.local_rank(AXIS):
            for name, tensor in own:
                _send(name, tensor, source, mesh)
                yield name, tensor
            _broadcast(torch.zeros(1, dtype=torch.int64), source, mesh)
            continue
        while (found := _receive(source, mesh)) is not None:
            yield found


def _send(name: str, tensor: Tensor, source: int, mesh: ProcessMesh) -> None:
    header = {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "on_cpu": tensor.device.type == "cpu",
    }
    raw = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    _broadcast(torch.tensor([len(raw)]), source, mesh)
    _broadcast(raw, source, mesh)
    _broadcast(tensor.contiguous(), source, mesh)


def _receive(source: int, mesh: ProcessMesh) -> tuple[str, Tensor] | None:
    """The next tensor of `source`; None after the last."""
    length = int(_broadcast(torch.zeros(1, dtype=torch.int64), source, mesh))
    if length == 0:
        return None
    raw = _broadcast(torch.empty(length, dtype=torch.uint8), source, mesh)
    header = json.loads(bytes(raw.tolist()))
    device = "cpu" if header["on_cpu"] else mesh.device
    tensor = torch.empty(header["shape"], dtype=DTYPES[header["dtype"]], device=device)
    return header["name"], _broadcast(tensor, source, mesh)


def _broadcast(tensor: Tensor, source: int, mesh: ProcessMesh) -> Tensor:
    dist.broadcast(tensor, group=mesh.group(AXIS), group_src=source)
    return tensor
