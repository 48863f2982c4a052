"""Tensors that each process of a pipeline has for itself, made known to all of them.

Owns the messages: a JSON header and the tensor's own memory.
"""

import json
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lowlat.train.parallel.team import Team

AXIS = "pipeline"
DTYPES = {
    str(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
}


def along_pipeline(team: Team, own: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """What `own` gives in every process along the pipeline, one process after the other, in all of
    them. Collective: to be read to its end.
    """
    if team.size(AXIS) == 1:
        yield from own
        return
    for source in range(team.size(AXIS)):
        if source == team.place(AXIS):
            for name, tensor in own:
                _tell(name, tensor, source, team)
                yield name, tensor
            _shared(torch.zeros(1, dtype=torch.int64), source, team)
            continue
        while (found := _heard(source, team)) is not None:
            yield found


def _tell(name: str, tensor: Tensor, source: int, team: Team) -> None:
    header = {
        "name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "on_cpu": tensor.device.type == "cpu",
    }
    raw = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    _shared(torch.tensor([len(raw)]), source, team)
    _shared(raw, source, team)
    _shared(tensor.contiguous(), source, team)


def _heard(source: int, team: Team) -> tuple[str, Tensor] | None:
    """The next tensor of `source`; None after the last."""
    length = int(_shared(torch.zeros(1, dtype=torch.int64), source, team))
    if length == 0:
        return None
    raw = _shared(torch.empty(length, dtype=torch.uint8), source, team)
    header = json.loads(bytes(raw.tolist()))
    device = "cpu" if header["on_cpu"] else team.device
    tensor = torch.empty(header["shape"], dtype=DTYPES[header["dtype"]], device=device)
    return header["name"], _shared(tensor, source, team)


def _shared(tensor: Tensor, source: int, team: Team) -> Tensor:
    dist.broadcast(tensor, group=team.group(AXIS), group_src=source)
    return tensor
