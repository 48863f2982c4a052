"""Routed experts over stacked weights with FP8 products (DeepSeek-V3 section 3.3).

Tiles span rows of one expert only, so that no token's scale depends on the tokens of other experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lowlat.ops.experts import swiglu
from lowlat.ops.fp8_training import TILE, Fp8Format, fp8_linear
from lowlat.ops.grouped import group_by_expert
from lowlat.ops.norm import accumulation_dtype
from lowlat.ops.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertFormats:
    """Quantization formats of routed experts."""

    up: Fp8Format
    """gate_proj and up_proj."""
    down: Fp8Format
    """down_proj."""


def fp8_grouped(
    x: Float[Tensor, "rows in"],
    weight: Float[Tensor, "experts out in"],
    counts: Sequence[int],
    fmt: Fp8Format,
) -> Float[Tensor, "rows out"]:
    """`grouped.grouped_linear` in FP8, with gradients: every expert's product with its own rows."""
    groups = zip(x.split(list(counts)), weight.unbind(0), strict=True)
    return torch.cat([fp8_linear(rows, matrix, None, fmt) for rows, matrix in groups])


def fp8_stacked_experts(
    x: Float[Tensor, "tokens hidden"],
    routing: Routing,
    gate_up_proj: Float[Tensor, "experts inner_twice hidden"],
    down_proj: Float[Tensor, "experts hidden inner"],
    formats: ExpertFormats,
) -> Float[Tensor, "tokens hidden"]:
    """`grouped.stacked_experts` in FP8; SwiGLU and the sum over experts are the same."""
    groups = group_by_expert(routing.experts, gate_up_proj.shape[0])
    order, tokens, counts = groups.order, groups.tokens, groups.counts
    wide = accumulation_dtype(x.dtype)
    # Via the wide dtype, so that a token's gradients are summed in it and rounded once.
    rows = x.to(wide).index_select(0, tokens).to(x.dtype)
    if down_proj.shape[2] % TILE:
        # A block must not span gate and up: checkpoints store them as two matrices.
        halves = gate_up_proj.chunk(2, dim=1)
        gate, up = (fp8_grouped(rows, half, counts, formats.up) for half in halves)
    else:
        gate, up = fp8_grouped(rows, gate_up_proj, counts, formats.up).chunk(2, dim=1)
    results = fp8_grouped(swiglu(gate, up), down_proj, counts, formats.down)
    factors = routing.weights.flatten()[order, None].to(wide)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    return out.index_add(0, tokens, results.to(wide) * factors).to(x.dtype)
