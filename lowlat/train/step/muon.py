"""Muon optimizer (Keller Jordan 2024): momentum orthogonalised by Newton-Schulz iteration, scaled
as in Moonlight (arXiv 2502.16982 section 2.2), for matrices and stacks of matrices.

torch.optim.Muon takes single matrices only; stacked experts are three-dimensional.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lowlat.train.parallel.mesh import ProcessMesh
from lowlat.train.parallel.sharding import Sharding

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic Newton-Schulz iteration."""
ITERATIONS = 5
UPDATE_RMS = 0.2
"""RMS of an update: that of AdamW, so that both share a learning rate."""


class Muon(torch.optim.Optimizer):
    """State per parameter: `momentum`, of its shape, fp32."""

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        shardings: Sequence[Sharding] | None = None,
        blocks: Sequence[int] | None = None,
        *,
        lr: float = 0.0,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
    ) -> None:
        """`shardings` of `params`; by default parameters are full tensors.

        `blocks` is the number of matrices stacked along the rows of each parameter: 2 for
        gate_up_proj, by default 1.
        """
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shardings = shardings or [Sharding(ProcessMesh(), p.shape) for p in params]
        self._shardings = dict(zip(map(id, params), shardings, strict=True))
        self._blocks = dict(zip(map(id, params), blocks or [1] * len(params), strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"]
        momentum.mul_(group["momentum"]).add_(parameter.grad)
        nesterov = parameter.grad.add(momentum, alpha=group["momentum"])
        sharding = self._shardings[id(parameter)]
        within = sharding.within_matrices()
        whole = within.full(nesterov)
        rows, columns = whole.shape[-2] // self._blocks[id(parameter)], whole.shape[-1]
        matrices = whole.unflatten(-2, (-1, rows))
        update = within.local(orthogonalized(matrices).flatten(-3, -2))
        scale = UPDATE_RMS * max(rows, columns) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalized(
    matrices: Float[Tensor, "*stack rows columns"],
) -> Float[Tensor, "*stack rows columns"]:
    """Newton-Schulz iteration: each matrix with its singular values brought near 1, in its own
    dtype.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
