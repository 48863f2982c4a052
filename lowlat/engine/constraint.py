"""What the sampler asks of whatever restricts an output: the interface alone.

Compiling structured outputs into it is grammar.py's, which needs a package of its own.
"""

import abc

from jaxtyping import Bool
from torch import Tensor


class ConstraintState(abc.ABC):
    """One output's place; for one thread at a time. Faults raise UserError and end that output."""

    @abc.abstractmethod
    def mask(self) -> Bool[Tensor, " vocab"]:
        """Which tokens may come next; end-of-sequence ids exactly where the output may end."""

    @abc.abstractmethod
    def accept(self, token: int) -> None:
        """Go on after `token`."""

    @property
    @abc.abstractmethod
    def is_done(self) -> bool:
        """Whether the output is complete, so that nothing but its end may follow."""


class Constraint(abc.ABC):
    """What outputs of a request must look like."""

    @abc.abstractmethod
    def start(self) -> ConstraintState:
        """A new output's place."""
