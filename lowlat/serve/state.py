"""ServerState: what all routes of one server share, and admission control.

`serve.app` creates it.
"""

from dataclasses import dataclass, field

from lowlat.generate.model import Model
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Draining, Overloaded
from lowlat.serve.http.incoming import IncomingBodies
from lowlat.serve.http.workers import WorkerPool
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.protocol.validation import one_line
from lowlat.serve.response_store import ResponseStore
from lowlat.serve.structured_outputs import StructuredOutputManager


@dataclass(eq=False, kw_only=True, slots=True)
class ServerState:
    """Components of a server, and counts of its active requests."""

    engine: AsyncEngine
    config: ServeConfig
    workers: WorkerPool
    bodies: IncomingBodies
    structured_outputs: StructuredOutputManager
    responses: ResponseStore
    started_at: int
    """Unix time in seconds when the app was created."""
    is_draining: bool = False
    """Set once, when shutdown begins."""
    num_requests: int = field(default=0, init=False)
    """Active requests whose body has arrived."""
    num_preparing: int = field(default=0, init=False)
    """Those of them not yet submitted to the engine."""

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def model_name(self) -> str:
        return self.config.model_name or self.model.name

    def check_capacity(self) -> None:
        """Raise Draining, EngineDead or Overloaded if no request can be admitted.

        Checked before the body is read, so that a refusal is cheap and immediate, and again after
        it: a body on its way takes no place.
        """
        if self.is_draining:
            raise Draining
        if self.num_requests >= self.config.max_requests:
            raise Overloaded(retry_after=1)
        self.engine.check_room(self.num_preparing)

    def check_model(self, name: str) -> None:
        """Raises RequestError 404 for any name but the served one."""
        if name != self.model_name:
            raise RequestError(
                f"the model '{one_line(name, 80)}' does not exist; this server serves "
                f"'{self.model_name}'",
                param="model",
                code="model_not_found",
                status=404,
            )

    def close(self) -> None:
        """Stop the threads."""
        self.workers.close()
        self.structured_outputs.close()
