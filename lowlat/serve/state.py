"""ServerState: what all routes of one server share, and admission control.

`serve.app` creates it.
"""

from dataclasses import dataclass, field

from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Draining, Overloaded
from lowlat.serve.http.incoming import IncomingBodies
from lowlat.serve.http.workers import WorkerPool
from lowlat.serve.model_registry import ModelRegistry
from lowlat.serve.response_store import ResponseStore


@dataclass(eq=False, kw_only=True, slots=True)
class ServerState:
    """Components of a server, and counts of its active requests."""

    models: ModelRegistry
    config: ServeConfig
    workers: WorkerPool
    bodies: IncomingBodies
    responses: ResponseStore
    started_at: int
    """Unix time in seconds when the app was created."""
    is_draining: bool = False
    """Set once, when shutdown begins."""
    num_requests: int = field(default=0, init=False)
    """Active requests whose body has arrived."""
    num_preparing: int = field(default=0, init=False)
    """Those of them whose model is not known yet."""

    def check_capacity(self) -> None:
        """Raise Draining, EngineDead, Overloaded or ModelUnavailable if no request can be admitted,
        whatever its model.

        Checked before the body is read, so that a refusal is cheap and immediate, and again after
        it: a body on its way takes no place.
        """
        if self.is_draining:
            raise Draining
        if self.num_requests >= self.config.max_requests:
            raise Overloaded(retry_after=1)
        self.models.check_room(self.num_preparing)

    def close(self) -> None:
        """Stop the threads."""
        self.workers.close()
        self.models.close()
