"""Low-rank updates beside frozen weights (LoRA, arXiv 2106.09685): W + alpha / rank * B A.

Owns the parameters and products of updates; which projections have one is `train.lora`'s.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class LowRank(nn.Module):
    """The update of one projection, or of one in each expert: lora_A [..., rank, in] and lora_B
    [..., out, rank], fp32. Unfilled.
    """

    def __init__(self, *stack: int, rank: int, rows: int, columns: int, scale: float) -> None:
        """`rows` and `columns` of the weight; `stack`: the number of experts, if any."""
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, columns))
        self.lora_B = nn.Parameter(torch.empty(*stack, rows, rank))

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """What the update adds to the product of `x`, in x's dtype."""
        inner = F.linear(x, self.lora_A.to(x.dtype))
        return F.linear(inner, (self.scale * self.lora_B).to(x.dtype))

    def delta(self) -> Float[Tensor, "*stack out in"]:
        """What the update adds to the weight, fp32."""
        return (self.scale * self.lora_B) @ self.lora_A


class LowRankExperts(nn.Module):
    """Updates of stacked experts, one pair per expert and projection."""

    def __init__(
        self, gate_proj: LowRank | None, up_proj: LowRank | None, down_proj: LowRank | None
    ) -> None:
        super().__init__()
        self.gate_proj = gate_proj
        self.up_proj = up_proj
        self.down_proj = down_proj

    def added(
        self,
        gate_up_proj: Float[Tensor, "experts inner_twice hidden"],
        down_proj: Float[Tensor, "experts hidden inner"],
    ) -> tuple[Tensor, Tensor]:
        """The weights with their updates, fp32 where there is one.

        Experts multiply with them as with weights of their own: the sum costs a copy of the
        layer's experts, whatever the number of tokens.
        """
        if self.gate_proj is not None or self.up_proj is not None:
            gate, up = gate_up_proj.chunk(2, dim=1)
            gate = gate if self.gate_proj is None else gate + self.gate_proj.delta()
            up = up if self.up_proj is None else up + self.up_proj.delta()
            gate_up_proj = torch.cat([gate, up], dim=1)
        if self.down_proj is not None:
            down_proj = down_proj + self.down_proj.delta()
        return gate_up_proj, down_proj
