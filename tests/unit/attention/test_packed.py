"""Packed attention: sequences do not see one another, and gradients are those of plain autograd."""

import pytest
import torch
from torch import Tensor

from tests.packed_attention import PackedAttention

LENGTHS = [1, 7, 3]


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def naive_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """All sequences of LENGTHS at once, with a block-diagonal causal mask; q, k, v [tokens,
    heads, width].
    """
    owner = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    place = torch.arange(len(owner))
    seen = (owner[:, None] == owner[None, :]) & (place[None, :] <= place[:, None])
    if window is not None:
        seen &= place[None, :] > place[:, None] - window
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def naive_mla(q_nope: Tensor, q_rope: Tensor, rows: Tensor, w_uk: Tensor, w_uv: Tensor) -> Tensor:
    c, k_rope = rows[:, :13], rows[:, 13:]
    k_nope = torch.einsum("kc,hnc->khn", c, w_uk)
    k = torch.cat([k_nope, k_rope[:, None].expand(-1, 3, -1)], dim=-1)
    v = torch.einsum("kc,hvc->khv", c, w_uv)
    return naive_attention(torch.cat([q_nope, q_rope], dim=-1), k, v, 0.3, None)


def assert_same_gradients(mine: Tensor, reference: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(mine, reference, rtol=0, atol=1e-12)
    weight = torch.randn_like(mine)
    got = torch.autograd.grad((mine * weight).sum(), inputs)
    expected = torch.autograd.grad((reference * weight).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_mla_gradients() -> None:
    inputs = [
        random(11, 3, 5),
        random(11, 3, 4),
        random(11, 17),
        random(3, 5, 13),
        random(3, 7, 13),
    ]
    mine = PackedAttention(LENGTHS).mla(0, *inputs, 0.3)
    assert_same_gradients(mine, naive_mla(*inputs), inputs)


@pytest.mark.parametrize("window", [None, 1, 3])
def test_gqa_gradients(window: int | None) -> None:
    inputs = [random(11, 6, 5), random(11, 2, 5), random(11, 2, 5)]
    mine = PackedAttention(LENGTHS).gqa(0, *inputs, 0.3, window)
    q, k, v = inputs
    k, v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    assert_same_gradients(mine, naive_attention(q, k, v, 0.3, window), inputs)


def test_large_scores_have_finite_gradients() -> None:
    inputs = [(x.detach() * 300).requires_grad_() for x in (random(11, 6, 5), random(11, 2, 5))]
    v = random(11, 2, 5)
    PackedAttention(LENGTHS).gqa(0, *inputs, v, 1.0, 2).sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in [*inputs, v])


def test_sequences_are_blind_to_each_other() -> None:
    inputs = [random(11, 6, 5), random(11, 2, 5), random(11, 2, 5)]
    before = PackedAttention(LENGTHS).gqa(0, *inputs, 0.3, None)
    changed = [x.detach().clone() for x in inputs]
    for x in changed:
        x[1:8] = 99.0
    after = PackedAttention(LENGTHS).gqa(0, *changed, 0.3, None)
    assert torch.equal(after[:1], before[:1]) and torch.equal(after[8:], before[8:])


def test_positions_start_at_zero_in_each_sequence() -> None:
    assert PackedAttention([2, 1, 3]).positions().tolist() == [0, 1, 0, 0, 1, 2]
