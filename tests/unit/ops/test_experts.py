"""SwiGLU by hand, and the mixture against a loop over tokens."""

import math

import pytest
import torch
from torch import Tensor

from lowlat.ops.experts import Expert, routed_experts, swiglu
from lowlat.ops.routing import Routing

HIDDEN, INNER, EXPERTS = 7, 5, 11


def weights_of(experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(experts, INNER, HIDDEN), (experts, INNER, HIDDEN), (experts, HIDDEN, INNER)]
    gate, up, down = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return gate, up, down


def experts_of(gate: Tensor, up: Tensor, down: Tensor) -> Expert:
    """SwiGLU experts of stacked weights."""
    return lambda e, x: swiglu(x @ gate[e].T, x @ up[e].T) @ down[e].T


def routing_of(tokens: int, chosen: int, dtype: torch.dtype) -> Routing:
    experts = torch.stack([torch.randperm(EXPERTS)[:chosen] for _ in range(tokens)])
    return Routing(experts, torch.rand(tokens, chosen, dtype=dtype), torch.rand(tokens, EXPERTS))


def test_swiglu_by_hand() -> None:
    # silu(1) = 1 / (1 + 1/e)
    out = swiglu(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([2.0, 3.0, -4.0]))
    silu = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(out, torch.tensor([2 * silu, 0.0, 4 * (1 - silu)]))


def test_swiglu_rounds_once() -> None:
    gate, up = (torch.randn(4001).to(torch.bfloat16) for _ in range(2))
    wide = gate.double() * gate.double().sigmoid() * up.double()
    moved = (swiglu(gate, up) != wide.to(torch.bfloat16)).float().mean()
    assert moved < 0.01


@pytest.mark.parametrize(("tokens", "chosen"), [(1, 1), (1, 3), (13, 3), (29, EXPERTS)])
def test_equals_a_loop_over_tokens(tokens: int, chosen: int) -> None:
    gate, up, down = weights_of(EXPERTS, torch.float64)
    x, routing = torch.randn(tokens, HIDDEN).double(), routing_of(tokens, chosen, torch.float64)
    expected = torch.zeros_like(x)
    for token in range(tokens):
        for expert, weight in zip(routing.experts[token], routing.weights[token], strict=True):
            g, u = gate[expert] @ x[token], up[expert] @ x[token]
            expected[token] += weight * (down[expert] @ (g * g.sigmoid() * u))
    out = routed_experts(x, routing, experts_of(gate, up, down))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_only_chosen_experts_are_read() -> None:
    used = []

    def apply(expert: int, rows: Tensor) -> Tensor:
        used.append((expert, rows.tolist()))
        return rows

    routing = Routing(torch.tensor([[7, 2], [2, 9]]), torch.ones(2, 2), torch.zeros(2, EXPERTS))
    x = torch.randn(2, HIDDEN)
    routed_experts(x, routing, apply)
    first, second = x.tolist()
    assert used == [(2, [first, second]), (7, [first]), (9, [second])]


def test_narrow_results_are_summed_in_fp32() -> None:
    """Eight experts that return 1, 2^-9, 2^-9 ...: in bf16 every small summand would vanish."""
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    routing = Routing(
        torch.arange(9)[None],
        torch.tensor([[1.0] + [2.0**-9] * 8]),
        torch.zeros(1, 9),
    )
    out = routed_experts(one, routing, lambda _expert, rows: rows)
    assert out.dtype == torch.bfloat16
    assert out.item() == 1 + 2**-6


def test_gradient_reaches_weights_and_input() -> None:
    gate, up, down = (w.requires_grad_() for w in weights_of(EXPERTS, torch.float64))
    x = torch.randn(3, HIDDEN, dtype=torch.float64, requires_grad=True)
    routing = routing_of(3, 2, torch.float64)
    factors = routing.weights.requires_grad_()

    def mixture(x: Tensor, factors: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return routed_experts(x, routing._replace(weights=factors), experts_of(gate, up, down))

    assert torch.autograd.gradcheck(mixture, (x, factors, gate, up, down), fast_mode=True)
