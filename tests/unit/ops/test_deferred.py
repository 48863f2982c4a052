"""Gradients that come later are the same gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lowlat.ops.deferred import add_gradient, deferred_linear
from lowlat.ops.grouped import stacked_experts
from lowlat.ops.routing import Routing

Work = list[Callable[[], None]]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(work: Work) -> None:
    for one in work:
        one()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(bias: bool, recompute: bool) -> None:
    """Recomputation replaces saved tensors by copies: the gradient must reach the weight itself."""
    x, weight, shift = random(3, 5, 7, seed=0), random(11, 7, seed=1), random(11, seed=2)
    expected = [t.clone().requires_grad_() for t in (x, weight, shift)]
    found = [t.clone().requires_grad_() for t in (x, weight, shift)]
    out = F.linear(expected[0], expected[1], expected[2] if bias else None)
    out.square().sum().backward()
    work: Work = []

    def forward(given: Tensor) -> Tensor:
        return deferred_linear(given, found[1], found[2] if bias else None, work.append)

    given = found[0]
    out = checkpoint(forward, given, use_reentrant=False) if recompute else forward(given)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    assert found[1].grad is None and len(work) == 1
    run(work)
    for one, other in zip(expected[: 2 + bias], found, strict=False):
        torch.testing.assert_close(other.grad, one.grad)


def test_the_input_may_need_no_gradient() -> None:
    weight = random(5, 3, seed=0).requires_grad_()
    work: Work = []
    deferred_linear(random(7, 3, seed=1), weight, None, work.append).sum().backward()
    run(work)
    torch.testing.assert_close(weight.grad, random(7, 3, seed=1).sum(0).expand(5, 3))


def test_a_frozen_weight_asks_for_nothing() -> None:
    x, work = random(7, 3, seed=1).requires_grad_(), []
    deferred_linear(x, random(5, 3, seed=0), None, work.append).sum().backward()
    assert x.grad is not None and not work


def test_a_master_weight_gets_its_own_dtype() -> None:
    weight = random(5, 3, seed=0, dtype=torch.float32).requires_grad_()
    work: Work = []
    x = random(7, 3, seed=1, dtype=torch.bfloat16)
    out = deferred_linear(x, weight, None, work.append)
    out.sum().backward()
    run(work)
    assert out.dtype == torch.bfloat16 and weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_gradients_add_up() -> None:
    weight = torch.zeros(2, requires_grad=True)
    add_gradient(weight, torch.ones(2))
    add_gradient(weight, torch.ones(2))
    assert weight.grad is not None and weight.grad.tolist() == [2.0, 2.0]


def test_experts() -> None:
    x, factors = random(13, 7, seed=0), random(13, 2, seed=1).abs()
    chosen = torch.randint(5, (13, 2), generator=torch.Generator().manual_seed(3))
    matrices = random(5, 6, 7, seed=4), random(5, 7, 3, seed=5)
    results = []
    for defers in (False, True):
        leaves = [t.clone().requires_grad_() for t in (x, factors, *matrices)]
        work: Work = []
        routing = Routing(chosen, leaves[1], leaves[1])
        later = work.append if defers else None
        stacked_experts(leaves[0], routing, leaves[2], leaves[3], later).square().sum().backward()
        assert len(work) == defers
        assert (leaves[2].grad is None) == (leaves[3].grad is None) == defers
        run(work)
        results.append([leaf.grad for leaf in leaves])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one)
