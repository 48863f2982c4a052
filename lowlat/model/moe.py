"""DeepSeekMoE (DeepSeek-V3 section 2.1.2): shared experts, routed experts and their gate; the
group-limited top-k routing is in `ops.routing`.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.config.model import ModelConfig, MoEConfig
from lowlat.model.exchange import EXPERT, Exchange, gathered
from lowlat.model.linear import Linear, RMSNorm
from lowlat.ops.experts import routed_experts, swiglu
from lowlat.ops.routing import Routing, route


class MLP(nn.Module):
    """SwiGLU MLP: down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, inner_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size, dtype=dtype)
        self.up_proj = Linear(hidden_size, inner_size, dtype=dtype)
        self.down_proj = Linear(inner_size, hidden_size, dtype=dtype)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Gate(nn.Module):
    """Router: scores every routed expert in fp32. e_score_correction_bias, the selection bias of
    auxiliary-loss-free load balancing, is fp32 on load, in training and in checkpoints.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.n_routed_experts, hidden_size, dtype=dtype))
        bias = torch.empty(moe.n_routed_experts, dtype=torch.float32)
        # Updated from the load of the experts, not by gradients.
        self.e_score_correction_bias = (
            nn.Parameter(bias, requires_grad=False) if moe.has_router_bias else None
        )

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        return route(x, self.weight, self.e_score_correction_bias, self.moe)


class Experts(nn.ModuleList):
    """The routed experts: one MLP per expert, so that expert weights stay memory-mapped."""

    def __init__(self, hidden_size: int, moe: MoEConfig, *, dtype: torch.dtype) -> None:
        inner = moe.moe_intermediate_size
        super().__init__(MLP(hidden_size, inner, dtype=dtype) for _ in range(moe.n_routed_experts))
        self.parts, self.rank = 1, 0
        """Processes that divide the experts, and the number of this one among them."""
        self.places = list(range(moe.n_routed_experts))
        """Expert of every place (EPLB: phy2log). Each process has as many consecutive places, by
        ascending expert; an expert with replicas has several."""
        self.exchange: Exchange | None = None

    @property
    def own(self) -> list[int]:
        """The experts of this process's places."""
        each = len(self.places) // self.parts
        return self.places[self.rank * each : (self.rank + 1) * each]

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        if self.parts == 1:
            return routed_experts(x, routing, lambda expert, rows: self[expert](rows))
        outputs = self._all_outputs(x, routing)
        return routed_experts(x, routing, lambda expert, _: outputs[expert])

    def _all_outputs(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> dict[int, Float[Tensor, "rows hidden"]]:
        """The outputs of all chosen experts, gathered from the processes that have them.

        Without replicas: rounding depends on the number of rows, so an expert's rows cannot be
        divided."""
        assert self.exchange is not None and len(self.places) == len(self)
        counts = torch.bincount(routing.experts.flatten(), minlength=len(self)).tolist()
        each = len(self) // self.parts
        most = max(sum(counts[first : first + each]) for first in range(0, len(self), each))
        own = x.new_zeros(most, x.shape[1])
        first = 0
        for expert in self.own:
            if counts[expert]:
                tokens = (routing.experts == expert).nonzero(as_tuple=True)[0]
                own[first : first + counts[expert]] = self[expert](x[tokens])
                first += counts[expert]
        gathered_rows = gathered(self.exchange, EXPERT, own, self.parts)
        outputs: dict[int, Tensor] = {}
        for rank, rows in enumerate(gathered_rows):
            sizes = counts[rank * each : (rank + 1) * each]
            parts = rows[: sum(sizes)].split(sizes)
            outputs |= dict(enumerate(parts, start=rank * each))
        return outputs


class MoE(nn.Module):
    """Routed experts plus shared experts, which are one MLP of n_shared_experts times the width;
    in axk1 with a norm on the sum.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Gate(config.hidden_size, moe, dtype=dtype)
        self.experts: nn.Module = Experts(config.hidden_size, moe, dtype=dtype)
        width = moe.n_shared_experts * moe.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, width, dtype=dtype) if width else None
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.post_mlp_layernorm = RMSNorm(hidden, eps, dtype=dtype) if moe.output_norm else None

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        routed = self.experts(x, self.gate(x))
        out = routed if self.shared_experts is None else routed + self.shared_experts(x)
        return out if self.post_mlp_layernorm is None else self.post_mlp_layernorm(out)
