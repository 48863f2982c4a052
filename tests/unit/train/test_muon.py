"""Orthogonalisation against the singular value decomposition, and one update by hand."""

import pytest
import torch
from torch import Tensor, nn

from lowlat.train.step.muon import Muon, orthogonalized


def matrix(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 23), (23, 7), (13, 13), (1, 5), (5, 1)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    """Singular vectors stay; values between 0.01 and 1 of the norm land in [0.67, 1.2], the bounds
    of the iteration's coefficients.
    """
    u, _, v = torch.linalg.svd(matrix(*shape), full_matrices=False)
    count = min(shape)
    values = torch.logspace(0, -1.5, count, dtype=torch.float64)
    found = orthogonalized(u @ values.diag() @ v)
    inside = u.T @ found @ v.T
    assert (inside - inside.diagonal().diag()).abs().max() < 1e-10
    assert 0.67 < inside.diagonal().min() and inside.diagonal().max() < 1.2
    torch.testing.assert_close(u @ inside @ v, found)


def test_scale_of_the_gradient_does_not_matter() -> None:
    one = matrix(5, 11)
    torch.testing.assert_close(orthogonalized(one), orthogonalized(1e4 * one))
    assert torch.equal(orthogonalized(torch.zeros(5, 11)), torch.zeros(5, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stacks_are_treated_matrix_by_matrix(dtype: torch.dtype) -> None:
    """Regression: one norm over all experts, which would leave quiet experts behind."""
    stack = matrix(5, 11, 7).to(dtype) * torch.logspace(-3, 3, 5, dtype=dtype)[:, None, None]
    together = orthogonalized(stack)
    for expert, alone in enumerate(stack):
        torch.testing.assert_close(together[expert], orthogonalized(alone))


@pytest.mark.parametrize("shape", [(5, 11), (11, 5), (3, 7, 4)])
def test_updates_by_hand(shape: tuple[int, ...]) -> None:
    """Momentum with Nesterov, decoupled decay, 0.2 sqrt(max(rows, columns)) as in Moonlight."""
    parameter = nn.Parameter(matrix(*shape))
    optimizer = Muon([parameter], lr=0.3, momentum=0.9, weight_decay=0.25)
    expected, momentum = parameter.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for step in range(3):
        grad = torch.randn(shape, dtype=torch.float64) + step
        parameter.grad = grad.clone()
        optimizer.step()
        momentum = 0.9 * momentum + grad
        update = 0.2 * max(shape[-2:]) ** 0.5 * orthogonalized(grad + 0.9 * momentum)
        expected = expected - 0.3 * (0.25 * expected + update)
        assert torch.equal(parameter.grad, grad)
    torch.testing.assert_close(parameter.detach(), expected)
    torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum)


def test_blocks_are_matrices_of_their_own() -> None:
    """Gate rows and up rows in one stack move as they would alone."""
    gate, up = matrix(3, 4, 7), matrix(3, 4, 7).flip(1).cos()
    both = nn.Parameter(torch.zeros(3, 8, 7, dtype=torch.float64))
    alone = [nn.Parameter(torch.zeros_like(gate)) for _ in range(2)]
    both.grad = torch.cat([gate, up], dim=1)
    alone[0].grad, alone[1].grad = gate, up
    Muon([both], blocks=[2], lr=1.0).step()
    Muon(alone, lr=1.0).step()
    torch.testing.assert_close(both.detach(), torch.cat([p.detach() for p in alone], dim=1))


def test_updates_have_the_size_of_adamws() -> None:
    """Root mean square 0.2 of a square matrix' update, whatever its gradient."""
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = 1e-3 * torch.randn(64, 64)
    Muon([parameter], lr=1.0, weight_decay=0.0).step()
    assert 0.15 < parameter.detach().square().mean().sqrt() < 0.25


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = nn.Parameter(matrix(3, 5))
    Muon([parameter], lr=1.0).step()
    assert torch.equal(parameter.detach(), matrix(3, 5))
