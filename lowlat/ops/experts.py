"""SwiGLU and the mixture of experts: each routed expert applied to the tokens routed to it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lowlat.ops.norm import accumulation_dtype
from lowlat.ops.routing import Routing

Expert = Callable[[int, Tensor], Tensor]
"""expert id, rows [rows, hidden] -> that expert's output for them, of the same shape."""


def swiglu(
    gate: Float[Tensor, "*rows inner"], up: Float[Tensor, "*rows inner"]
) -> Float[Tensor, "*rows inner"]:
    """silu(gate) * up, computed in fp32 and rounded once."""
    wide = accumulation_dtype(gate.dtype)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def routed_experts(
    x: Float[Tensor, "tokens hidden"], routing: Routing, apply: Expert
) -> Float[Tensor, "tokens hidden"]:
    """Weighted sum over the chosen experts, accumulated in fp32 in order of expert id. Only the
    weights of chosen experts are read.
    """
    out = torch.zeros_like(x, dtype=accumulation_dtype(x.dtype))
    for expert in routing.experts.unique().tolist():
        tokens, places = (routing.experts == expert).nonzero(as_tuple=True)
        result = apply(expert, x[tokens])
        factor = routing.weights[tokens, places, None].to(out.dtype)
        out = out.index_add(0, tokens, result.to(out.dtype) * factor)
    return out.to(x.dtype)
