"""The interface of everything that can be compared."""

from abc import ABC, abstractmethod

from lowlat.compare.trace import Choices, Trace, Window
from lowlat.config.model import ModelConfig


class Side(ABC):
    """A model in one implementation, loaded."""

    label: str
    """What the user called it."""
    config: ModelConfig
    """What its checkpoint says, which need not be what the implementation does."""
    precision: str
    """fp64, fp32, bf16, fp16, fp8, int8 or int4: what the comparison's tolerance follows."""
    unseen: str
    """Which parts cannot be observed and why; empty if all can."""
    takes_choices: bool
    """Whether experts can be imposed on it."""

    @abstractmethod
    def trace(self, window: Window, choices: Choices | None = None) -> Trace:
        """Run `window` and record what can be seen; `choices` imposes the experts of the gates
        that it names.
        """
