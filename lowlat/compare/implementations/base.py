"""Interface of a comparable implementation, and requests to a peer's worker process."""

import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowlat.compare.trace import RoutedExperts, Trace, Window
from lowlat.config.model import ModelConfig
from lowlat.peers.protocol import one_line
from lowlat.peers.worker import NotInstalled, PeerError, UnsupportedRequest, Worker
from lowlat.utils.errors import UserError

TIMEOUT = 3600.0
"""Seconds for loading, and for one window."""
REMEDY = "read fewer tokens at once with --window, or try another version of it"
"""Remedy in the error message of a peer that fails at run time."""


class Implementation(ABC):
    """A loaded model in one implementation."""

    label: str
    """Its name on the command line."""
    config: ModelConfig
    """The checkpoint's config; the implementation may deviate from it."""
    precision: str
    """Number type of its weights: fp64, fp32, bf16, fp16, fp8, int8 or int4."""
    cache_precision: str | None = None
    """Number type of its KV cache; None: that of the activations."""
    unseen: str
    """Parts that cannot be observed, with the reason; empty if all can."""
    can_impose_experts: bool
    """Whether it reports its selected experts, and can run with imposed ones."""

    @abstractmethod
    def trace(self, window: Window, experts: RoutedExperts | None = None) -> Trace:
        """Run `window` and record its parts. experts: override the router's selection."""


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


def run_in_worker(module: str, requests: Sequence[dict[str, Any]], *, label: str) -> None:
    """Send `requests` to a new worker process that runs lowlat's `module`, then end it.

    Peers run in separate processes, because a failed assertion of llama.cpp ends its process and
    DeepSeek's model.py is the user's code. Raises UserError, in one line, if the worker fails.
    """
    with tempfile.TemporaryDirectory(prefix="lowlat-compare-") as folder:
        place = Path(folder)
        name = module.rpartition(".")[2]
        with Worker(name, module, python=sys.executable, threads=None, folder=place) as worker:
            try:
                for request in requests:
                    worker.ask(timeout=TIMEOUT, **request)
            except NotInstalled as error:
                raise UserError(f"{label}: fails at run time: {error.detail}; {REMEDY}") from error
            except (UserError, UnsupportedRequest) as error:
                raise UserError(f"{label}: {error}") from error
            except PeerError as error:
                raise UserError(f"{label}: fails at run time: {error}; {REMEDY}") from error
