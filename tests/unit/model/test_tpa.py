"""TPA against its definition, its rows and its first weights."""

import math
from dataclasses import replace

import pytest
import torch

from lowlat.config.model import RopeConfig, TPAConfig
from lowlat.model.init import init_weights
from lowlat.model.tpa import TPA as Module
from lowlat.model.transformer import Transformer
from lowlat.ops.rope import RotaryEmbedding, apply_rope
from tests.lowlat_configs import TPA, lowlat_config, random_model

from .draw import attention_case


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("attention", [TPA, replace(TPA, q_rank=None, k_rank=3)])
def test_naive(attention: TPAConfig, interleave: bool) -> None:
    """Queries, keys and values are built in full and rotated head by head, after the sum."""
    module, x, packed, rope = attention_case(attention, interleave=interleave)
    assert isinstance(module, Module)

    def build(a: torch.Tensor, b: torch.Tensor, rank: int) -> torch.Tensor:
        heads = (x @ a.T).view(17, rank, 5)
        channels = (x @ b.T).view(17, rank, 14)
        return sum(heads[:, r, :, None] * channels[:, r, None, :] for r in range(rank)) / rank

    if attention.q_rank is None:
        q = (x @ module.q_proj.weight.T).view(17, 5, 14)
    else:
        q = build(module.q_a_proj.weight, module.q_b_proj.weight, attention.q_rank)
    k = build(module.k_a_proj.weight, module.k_b_proj.weight, attention.k_rank)
    v = build(module.v_a_proj.weight, module.v_b_proj.weight, attention.v_rank)
    q, k = (apply_rope(part, rope, interleave=interleave) for part in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k) / 14**0.5
    seen = torch.ones(17, 17, dtype=torch.bool).tril()
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    out = torch.einsum("hqk,khd->qhd", weights, v).flatten(1) @ module.o_proj.weight.T
    torch.testing.assert_close(module(x, rope, packed), out, rtol=0, atol=1e-12)


def test_a_row_holds_the_factors() -> None:
    assert TPA.entry_dim == (2 + 1) * (5 + 14)
    module = random_model(lowlat_config(TPA), torch.float64).layers[0].self_attn
    assert isinstance(module, Module)
    x = torch.randn(3, 23, dtype=torch.float64)
    rope = RotaryEmbedding(RopeConfig(rope_theta=50.0), 14)(torch.tensor([0, 0, 0]))
    names = ("k_b_proj", "v_b_proj", "k_a_proj", "v_a_proj")
    parts = [x @ module.get_parameter(f"{name}.weight").T for name in names]
    torch.testing.assert_close(module.entries(x, rope), torch.cat(parts, dim=1))


def test_first_weights_are_within_the_published_bounds() -> None:
    """sqrt(6 / (fan in + fan out)) of tensors [hidden, heads, rank], [hidden, rank, head_dim]."""
    attention = TPAConfig(num_attention_heads=11, head_dim=14, q_rank=5, k_rank=2, v_rank=3)
    model = Transformer(lowlat_config(attention, hidden_size=67, initializer_range=0.01))
    init_weights(model, seed=3)
    module = model.layers[1].self_attn
    assert isinstance(module, Module)
    for part, rank in (("q", 5), ("k", 2), ("v", 3)):
        a, b = (module.get_parameter(f"{part}_{factor}_proj.weight") for factor in "ab")
        for weight, bound in (
            (a, math.sqrt(6 / (rank * (67 + 11)))),
            (b, math.sqrt(6 / (14 * (67 + rank)))),
        ):
            assert 0.97 * bound < weight.abs().max().item() <= bound
            assert 0.93 < weight.std().item() / (bound / math.sqrt(3)) < 1.07
    assert 0.9 < module.o_proj.weight.std().item() / 0.01 < 1.1
