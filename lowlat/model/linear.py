"""Linear and RMSNorm as modules: parameters in their stored type, arithmetic in `ops`."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.config.model import QuantConfig
from lowlat.ops.fp8 import dequantize_blocks
from lowlat.ops.norm import rms_norm


def block_grid(rows: int, columns: int, block: tuple[int, int]) -> tuple[int, int]:
    """Blocks along each axis, the last ones possibly cut short."""
    return -(-rows // block[0]), -(-columns // block[1])


class Linear(nn.Module):
    """y = x W^T + b. `weight` [out, in] is a plain dtype, or fp8 blocks beside
    `weight_scale_inv`.
    """

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = False, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.block: tuple[int, int] | None = None
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype))
        self.weight_scale_inv: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None

    def store_fp8(self, quant: QuantConfig) -> None:
        """Replace the (still unfilled) weight by fp8 blocks and their scales."""
        self.block = quant.weight_block_size
        rows, columns = self.weight.shape
        device = self.weight.device
        self.weight = _frozen(torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=device))
        grid = block_grid(rows, columns, self.block)
        self.weight_scale_inv = _frozen(torch.empty(grid, dtype=torch.float32, device=device))

    def dense_weight(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight as a matrix of `dtype`."""
        if self.weight_scale_inv is None:
            return self.weight.to(dtype)
        assert self.block is not None
        return dequantize_blocks(self.weight, self.weight_scale_inv, self.block, dtype)

    def forward(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dense_weight(x.dtype), bias)


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight; computes in fp32."""

    def __init__(self, dim: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """Rows of `weight` [vocab, hidden] by token id; also the head of models with tied
    embeddings.
    """

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))

    def forward(self, ids: Tensor) -> Float[Tensor, "tokens hidden"]:
        return F.embedding(ids, self.weight)


def _frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter no gradient can reach: autograd does not know fp8."""
    return nn.Parameter(tensor, requires_grad=False)
