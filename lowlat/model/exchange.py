"""Exchange of a divided model: all-gathers among the processes that divide its layers by tensor and
expert parallelism.

Inputs of linear layers and outputs of experts are gathered, and no partial sums are added, so that
every output has the sums of one process, in their order.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor


@runtime_checkable
class Exchange(Protocol):
    """All-gathers of one process."""

    def gather(self, group: int, own: Shaped[Tensor, "..."], out: Shaped[Tensor, "..."]) -> None:
        """Send `own` to the processes of a group, and fill `out` with the tensors of all, in order
        of their ranks. Both are contiguous."""
        ...


TENSOR, EXPERT = 0, 1
"""Groups: of tensor parallelism, of expert parallelism (DivisionGroup in csrc/model.h)."""


def gathered(
    exchange: Exchange, group: int, own: Shaped[Tensor, "..."], size: int
) -> Shaped[Tensor, "size ..."]:
    """The tensors of all `size` processes of a group, stacked: [size, ...]."""
    own = own.contiguous()
    out = torch.empty(size, *own.shape, dtype=own.dtype)
    if own.nbytes:
        exchange.gather(group, own, out)
    return out
