"""Interface of a comparable implementation, and errors of peers."""

from abc import ABC, abstractmethod

from lowlat.compare.trace import NONE_IMPOSED, ImposedChoices, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.peers.protocol import one_line
from lowlat.utils.errors import UserError

REMEDY = "read fewer tokens at once with --window, or try another version of it"
"""Remedy in the error message of a peer that fails at run time."""


class Implementation(ABC):
    """A loaded model in one implementation."""

    label: str
    """Its name on the command line."""
    config: ModelConfig
    """The checkpoint's config; the implementation may deviate from it."""
    precision: str
    """Data type of its weights: fp64, fp32, bf16, fp16, fp8, int8 or int4."""
    cache_precision: str | None = None
    """Data type of its KV cache; None: that of the activations."""
    unseen: str
    """Parts that cannot be observed, with the reason; empty if all can."""
    can_impose_experts: bool
    """Whether it reports its selected experts, and can run with imposed ones."""
    can_impose_tokens: bool
    """The same for the tokens that sparse attention (DSA) chooses."""

    @abstractmethod
    def trace(self, window: Window, imposed: ImposedChoices = NONE_IMPOSED) -> Trace:
        """Run `window` and record its parts. imposed: its experts override the router's selection;
        attention is over its tokens, and the recorded choice is still that of the own indexer.
        """


def import_error(module: str, package: str, error: Exception, *, label: str) -> UserError:
    """Error for a peer's `module` that is not installed or fails to import."""
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return UserError(
            f"{label} needs the package {package}, which is not installed; "
            f"install it with: pip install {package}"
        )
    return UserError(
        f"{label}: {package} cannot be imported: {one_line(error)}; try another version of it"
    )
