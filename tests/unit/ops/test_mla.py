"""Both forms of MLA: equal to each other and to the paper's equations written out."""

import pytest
import torch
from torch import Tensor

from lowlat.ops.mla import absorbed_mla, expanded_mla

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def draw(
    *,
    queries: int,
    start: int,
    heads: int = 3,
    nope: int = 5,
    rope: int = 4,
    latent: int = 13,
    v: int = 7,
) -> Inputs:
    shapes = [
        (queries, heads, nope),
        (queries, heads, rope),
        (start + queries, latent + rope),
        (heads, nope, latent),
        (heads, v, latent),
    ]
    q_nope, q_rope, rows, w_uk, w_uv = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q_nope, q_rope, rows, w_uk, w_uv


def written_out(inputs: Inputs, *, start: int, scale: float) -> Tensor:
    """DeepSeek-V2 equations 14-18, head by head and query by query."""
    q_nope, q_rope, rows, w_uk, w_uv = inputs
    latent = w_uk.shape[-1]
    out = torch.empty(len(q_nope), len(w_uk), w_uv.shape[1], dtype=torch.float64)
    for query in range(len(q_nope)):
        c, k_rope = rows[: start + query + 1].split([latent, rows.shape[1] - latent], dim=1)
        for head in range(len(w_uk)):
            scores = (c @ w_uk[head].T) @ q_nope[query, head] + k_rope @ q_rope[query, head]
            out[query, head] = (scores * scale).softmax(0) @ (c @ w_uv[head].T)
    return out


SHAPES = [
    {"queries": 1, "start": 0},
    {"queries": 1, "start": 17},
    {"queries": 11, "start": 0, "heads": 5, "v": 2},
    {"queries": 7, "start": 6, "nope": 1, "latent": 3},
    {"queries": 3, "start": 2, "nope": 0, "rope": 6},
]


@pytest.mark.parametrize("shape", SHAPES)
def test_absorbed_equals_expanded(shape: dict[str, int]) -> None:
    """Regression: up-projections applied on the wrong side, swapped, or rounded (1e-10 leaves no
    room).
    """
    inputs = draw(**shape)
    options = {"start": shape["start"], "scale": 0.3}
    absorbed = absorbed_mla(*inputs, **options)
    torch.testing.assert_close(absorbed, expanded_mla(*inputs, **options), rtol=0, atol=1e-10)
    torch.testing.assert_close(absorbed, written_out(inputs, **options), rtol=0, atol=1e-10)


@pytest.mark.parametrize("key_block", [1, 4, 64])
def test_expansion_in_blocks(key_block: int) -> None:
    inputs = draw(queries=5, start=8)
    out = expanded_mla(*inputs, start=8, scale=0.3, key_block=key_block)
    torch.testing.assert_close(out, written_out(inputs, start=8, scale=0.3), rtol=0, atol=1e-10)


def test_paths_agree_in_bf16_by_tolerance() -> None:
    """Each form rounds q, k and v of other shapes, so bits differ; both stay near the exact
    result.
    """
    inputs = draw(queries=5, start=12, latent=31)
    narrow = tuple(x.to(torch.bfloat16) for x in inputs)
    exact = written_out(tuple(x.double() for x in narrow), start=12, scale=0.2)
    for form in (absorbed_mla, expanded_mla):
        out = form(*narrow, start=12, scale=0.2)
        assert out.dtype == torch.bfloat16
        error = (out.double() - exact).norm() / exact.norm()
        assert error < 0.02
