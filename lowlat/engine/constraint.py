"""Output constraint of guided decoding: the interface through which a grammar gives the sampler
a token mask (token bitmask).

`generate.grammar` compiles structured outputs into it. The engine knows nothing else of grammars,
and this module imports no torch.
"""

import abc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ConstraintState(abc.ABC):
    """The position of one output in its constraint; used by one thread at a time.

    `mask` and `accept` raise UserError when the constraint exceeds a limit; the engine ends that
    output alone.
    """

    @abc.abstractmethod
    def mask(self) -> "Tensor":
        """bool [vocab]: tokens allowed next. An end-of-sequence id is allowed exactly when the
        output may end."""

    @abc.abstractmethod
    def accept(self, token: int) -> None:
        """Advance by `token`."""

    @property
    @abc.abstractmethod
    def is_done(self) -> bool:
        """Whether the output is complete: only an end-of-sequence id may follow."""


class Constraint(abc.ABC):
    """A compiled constraint on all outputs of a request."""

    @abc.abstractmethod
    def start(self) -> ConstraintState:
        """The state of a new output."""
