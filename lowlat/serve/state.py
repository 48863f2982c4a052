"""Services: what the routes of one server share.

Owns nothing but the names; `serve.app` makes the parts.
"""

from dataclasses import dataclass, field

from lowlat.generate.model import Model
from lowlat.serve.async_engine import AsyncEngine
from lowlat.serve.config import ServeConfig
from lowlat.serve.generation import Draining, Overloaded
from lowlat.serve.http.workers import WorkPool
from lowlat.serve.protocol.errors import RequestError
from lowlat.serve.structured_outputs import Grammars


@dataclass(eq=False, kw_only=True, slots=True)
class Services:
    """Parts of a server, and whether it takes new requests."""

    engine: AsyncEngine
    config: ServeConfig
    workers: WorkPool
    grammars: Grammars
    started_at: int
    """Unix time in seconds when the app was made."""
    is_draining: bool = False
    """Set once, when the server is told to end."""
    num_requests: int = field(default=0, init=False)
    """Requests with a body under way."""
    num_coming: int = field(default=0, init=False)
    """Those of them that the engine does not have yet."""

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def model_name(self) -> str:
        """The name clients ask for."""
        return self.config.model_name or self.model.name

    def check_room(self) -> None:
        """Raises what refuses any request, whatever it holds: Draining, EngineDead, Overloaded.

        Asked before a body is read, so that a refusal costs nothing and comes at once.
        """
        if self.is_draining:
            raise Draining
        if self.num_requests >= self.config.max_requests:
            raise Overloaded(retry_after=1)
        self.engine.check_room(self.num_coming)

    def check_model(self, name: str) -> None:
        """Raises RequestError 404 for any name but the served one."""
        if name != self.model_name:
            raise RequestError(
                f"the model '{name[:80]}' does not exist; this server has '{self.model_name}'",
                param="model",
                code="model_not_found",
                status=404,
            )

    def close(self) -> None:
        """End the threads."""
        self.workers.close()
        self.grammars.close()
