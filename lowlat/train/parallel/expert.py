"""Expert parallelism: routed experts divided among processes, tokens dispatched to them and
combined by all-to-all (DeepSeek-V3 section 3.2.2).
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from lowlat.ops.grouped import group_by_expert
from lowlat.ops.norm import accumulation_dtype
from lowlat.ops.routing import Routing
from lowlat.train.layers.fp8 import Fp8Experts
from lowlat.train.layers.stacked_experts import StackedExperts
from lowlat.train.parallel.collectives import all_to_all, applied


class ExpertParallelExperts(nn.Module):
    """`StackedExperts` with a contiguous shard of the experts, under the same parameter names: rank
    i of `group` has the experts before those of rank i + 1.

    Every process routes its own tokens. Dispatch and combine transfer activations in their dtype;
    routing weights apply after combine, so that sums over experts are fp32 as in one process.
    """

    def __init__(self, experts: StackedExperts | Fp8Experts, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.gate_up_proj = experts.gate_up_proj
        self.down_proj = experts.down_proj
        self.is_fp8 = isinstance(experts, Fp8Experts)
        self._products = experts.products
        self._group = group

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        own = self.gate_up_proj.shape[0]
        size = self._group.size()
        groups = group_by_expert(routing.experts, own * size)
        counts = _exchanged_counts(groups.counts, self._group, x.device)
        sent = [sum(groups.counts[i * own : (i + 1) * own]) for i in range(size)]
        received = counts.sum(dim=1).tolist()
        rows = all_to_all(_taken(x, groups.tokens), sent, received, self._group)
        # Each process sends the rows of this process's first expert, then of its second, and so on.
        ids = torch.arange(own, device=x.device).repeat(size).repeat_interleave(counts.flatten())
        ones = torch.ones(len(ids), 1, dtype=routing.weights.dtype, device=x.device)
        local = Routing(ids[:, None], ones, ones)
        out = self._products(rows, local, self.gate_up_proj, self.down_proj)
        out = all_to_all(out, received, sent, self._group)
        wide = accumulation_dtype(x.dtype)
        factors = routing.weights.flatten()[groups.order, None].to(wide)
        combined = torch.zeros(x.shape, dtype=wide, device=x.device)
        return combined.index_add(0, groups.tokens, out.to(wide) * factors).to(x.dtype)


def _exchanged_counts(
    counts: list[int], group: dist.ProcessGroup, device: torch.device
) -> Int[Tensor, "processes own"]:
    """Rows that each process sends to each expert of this one."""
    mine = torch.tensor(counts, device=device)
    theirs = torch.empty_like(mine)
    dist.all_to_all_single(theirs, mine, group=group)
    return theirs.unflatten(0, (group.size(), -1))


def _taken(
    x: Float[Tensor, "tokens hidden"], tokens: Int[Tensor, "rows"]
) -> Float[Tensor, "rows hidden"]:
    """x[tokens], whose gradient is summed in fp32 and rounded once."""
    return applied(_Taken, x, tokens)


class _Taken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = x.shape
        return x[tokens]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (tokens,) = ctx.saved_tensors
        wide = accumulation_dtype(grad.dtype)
        out = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        out.index_add_(0, tokens, grad.to(wide))
        return out.to(grad.dtype), None
