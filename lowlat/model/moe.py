"""DeepSeekMoE: shared experts every token uses and routed experts chosen by the gate (V3 section
2.1.2).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.config.model import ModelConfig, MoEConfig, QuantConfig
from lowlat.model.linear import Linear, block_grid
from lowlat.ops.experts import routed_experts, swiglu
from lowlat.ops.fp8 import dequantize_blocks
from lowlat.ops.routing import Routing, route


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, hidden_size: int, inner_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, inner_size, dtype=dtype)
        self.up_proj = Linear(hidden_size, inner_size, dtype=dtype)
        self.down_proj = Linear(inner_size, hidden_size, dtype=dtype)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Gate(nn.Module):
    """Scores every routed expert in fp32; the selection bias stays fp32 through load, training and
    save.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.moe = moe
        self.weight = nn.Parameter(torch.empty(moe.n_routed_experts, hidden_size, dtype=dtype))
        biased = moe.topk_method == "noaux_tc"
        bias = torch.empty(moe.n_routed_experts, dtype=torch.float32)
        # Moved by the load of the experts, never by a gradient.
        self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False) if biased else None

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        return route(x, self.weight, self.e_score_correction_bias, self.moe)


class Experts(nn.Module):
    """The routed experts' SwiGLU weights, stacked: gate_proj, up_proj [experts, inner, hidden],
    down_proj turned.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.block: tuple[int, int] | None = None
        count, inner = moe.n_routed_experts, moe.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(count, inner, hidden_size, dtype=dtype))
        self.up_proj = nn.Parameter(torch.empty(count, inner, hidden_size, dtype=dtype))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, inner, dtype=dtype))
        self.gate_proj_scale_inv: nn.Parameter | None = None
        self.up_proj_scale_inv: nn.Parameter | None = None
        self.down_proj_scale_inv: nn.Parameter | None = None

    def store_fp8(self, quant: QuantConfig) -> None:
        """Replace the (still unfilled) weights by fp8 blocks and their scales."""
        self.block = quant.weight_block_size
        self.gate_proj, self.gate_proj_scale_inv = self._fp8_pair(self.gate_proj)
        self.up_proj, self.up_proj_scale_inv = self._fp8_pair(self.up_proj)
        self.down_proj, self.down_proj_scale_inv = self._fp8_pair(self.down_proj)

    def _fp8_pair(self, dense: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter]:
        assert self.block is not None
        count, rows, columns = dense.shape
        scale = torch.empty(count, *block_grid(rows, columns, self.block), device=dense.device)
        weight = torch.empty_like(dense, dtype=torch.float8_e4m3fn)
        return nn.Parameter(weight, requires_grad=False), nn.Parameter(scale, requires_grad=False)

    def dense_weights(self, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """gate, up and down of one expert as matrices of `dtype`."""
        return (
            self._dense(self.gate_proj, self.gate_proj_scale_inv, expert, dtype),
            self._dense(self.up_proj, self.up_proj_scale_inv, expert, dtype),
            self._dense(self.down_proj, self.down_proj_scale_inv, expert, dtype),
        )

    def _dense(
        self, weight: Tensor, scale: Tensor | None, expert: int, dtype: torch.dtype
    ) -> Tensor:
        if scale is None:
            return weight[expert].to(dtype)
        assert self.block is not None
        return dequantize_blocks(weight[expert], scale[expert], self.block, dtype)

    def forward(
        self, x: Float[Tensor, "tokens hidden"], routing: Routing
    ) -> Float[Tensor, "tokens hidden"]:
        return routed_experts(x, routing, lambda expert: self.dense_weights(expert, x.dtype))


class MoE(nn.Module):
    """Routed experts plus the shared ones, which are one MLP n_shared_experts times as wide."""

    def __init__(self, config: ModelConfig, moe: MoEConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = Gate(config.hidden_size, moe, dtype=dtype)
        self.experts = Experts(config.hidden_size, moe, dtype=dtype)
        width = moe.n_shared_experts * moe.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, width, dtype=dtype) if width else None

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        routed = self.experts(x, self.gate(x))
        return routed if self.shared_experts is None else routed + self.shared_experts(x)
