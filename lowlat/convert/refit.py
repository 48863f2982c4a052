"""The projection that joins the heads (W_O), fitted again after a compression.

A compressed layer's heads put out something else, and the residual stream before it has drifted. As
far as a linear map of the heads' outputs can, a new W_O makes up for both: ridge regression on
calibration text towards the original's residual stream behind its attention. Owns that regression.
"""

from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

RIDGE = 0.1
"""What a change of W_O costs, relative to the mean square of what it reads. Smaller fits the
calibration text closely and other text worse.
"""


@final
class Refit:
    """Sums over tokens of one layer. Tokens count by the size of the residual stream they are in,
    as the norms behind it see them.
    """

    def __init__(self, weight: Float[Tensor, "hidden heads_out"], bias: Tensor | None) -> None:
        self._weight, self._bias = weight.double(), bias
        hidden, width = weight.shape
        self._moments = torch.zeros(width, width, dtype=torch.float64)
        self._wanted = torch.zeros(width, hidden, dtype=torch.float64)

    def add(
        self,
        given: Float[Tensor, "length heads_out"],
        before: Float[Tensor, "length hidden"],
        wanted: Float[Tensor, "length hidden"],
    ) -> None:
        """A window of text: what W_O reads, the compressed model's residual stream before the
        attention, and the original's behind it.
        """
        missing = wanted - before
        if self._bias is not None:
            missing = missing - self._bias
        counts = wanted.square().sum(1, keepdim=True).clamp(min=1e-30).reciprocal()
        weighted = given * counts
        self._moments += weighted.T @ given
        self._wanted += weighted.T @ missing

    def solution(self) -> Float64[Tensor, "hidden heads_out"]:
        """The new W_O."""
        ridge = RIDGE * self._moments.diagonal().mean().clamp(min=1e-30)
        held = self._moments + ridge * torch.eye(len(self._moments), dtype=torch.float64)
        return torch.linalg.solve(held, self._wanted + ridge * self._weight.T).T.contiguous()
