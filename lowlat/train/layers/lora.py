"""LoRA modules (arXiv 2106.09685): frozen weights with low-rank updates, W + alpha / rank * B A."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.model.linear import Linear
from lowlat.model.replace_modules import adopt
from lowlat.ops.routing import Routing
from lowlat.train.layers.stacked_experts import StackedExperts


class LowRank(nn.Module):
    """The low-rank update of a projection, or of that projection in every expert: lora_A
    [..., rank, in] and lora_B [..., out, rank], fp32 and unfilled.
    """

    def __init__(self, *stack: int, rank: int, rows: int, columns: int, scale: float) -> None:
        """`rows` and `columns` of the weight; `stack`: the number of experts, if any."""
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, columns))
        self.lora_B = nn.Parameter(torch.empty(*stack, rows, rank))

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """scale * x A^T B^T in x's dtype."""
        inner = F.linear(x, self.lora_A.to(x.dtype))
        return F.linear(inner, (self.scale * self.lora_B).to(x.dtype))

    def delta(self) -> Float[Tensor, "*stack out in"]:
        """scale * B A, fp32."""
        return (self.scale * self.lora_B) @ self.lora_A


class LowRankExperts(nn.ModuleDict):
    """Updates of stacked experts: a `LowRank` by the name of its projection, for those that have
    one.
    """

    def added(
        self,
        gate_up_proj: Float[Tensor, "experts inner_twice hidden"],
        down_proj: Float[Tensor, "experts hidden inner"],
    ) -> tuple[Tensor, Tensor]:
        """The weights plus their updates, fp32 where a projection has an update.

        The sum copies the layer's experts, whatever the number of tokens.
        """
        if "gate_proj" in self or "up_proj" in self:
            gate, up = gate_up_proj.chunk(2, dim=1)
            gate_up_proj = torch.cat(
                [self._added("gate_proj", gate), self._added("up_proj", up)], dim=1
            )
        return gate_up_proj, self._added("down_proj", down_proj)

    def _added(self, name: str, weight: Tensor) -> Tensor:
        if name not in self:
            return weight
        update = self[name]
        assert isinstance(update, LowRank)
        return weight + update.delta()


class LoraLinear(Linear):
    """Linear with a frozen plain weight W and a low-rank update: x (W + alpha / rank B A)^T."""

    def __init__(self, linear: Linear, low_rank: LowRank) -> None:
        adopt(self, linear)
        self.low_rank = low_rank

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias) + self.low_rank(x)

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        return (self.weight + self.low_rank.delta()).to(dtype)


class LoraExperts(StackedExperts):
    """`StackedExperts` with frozen weights and low-rank updates."""

    def __init__(self, experts: StackedExperts, low_rank: LowRankExperts) -> None:
        adopt(self, experts)
        self.low_rank = low_rank

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        return self.products(x, routing, *self.low_rank.added(self.gate_up_proj, self.down_proj))
