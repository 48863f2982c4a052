"""RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums over inputs of `dtype`: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(
    x: Float[Tensor, "*rows dim"], weight: Float[Tensor, "dim"], eps: float
) -> Float[Tensor, "*rows dim"]:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 and rounded once to
    x's dtype.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return (wide * scale * weight.to(wide.dtype)).to(x.dtype)


def layer_norm(
    x: Float[Tensor, "*rows dim"],
    weight: Float[Tensor, "dim"],
    bias: Float[Tensor, "dim"],
    eps: float,
) -> Float[Tensor, "*rows dim"]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, computed in fp32 and
    rounded once to x's dtype.
    """
    wide = x.to(accumulation_dtype(x.dtype))
    weight, bias = weight.to(wide.dtype), bias.to(wide.dtype)
    return F.layer_norm(wide, weight.shape, weight, bias, eps).to(x.dtype)
