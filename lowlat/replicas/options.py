"""Options of the replicas of a model: arguments of the Ray Serve application."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from lowlat.serve.config import ServeConfig, read_keys

GRACE_SECONDS = 10.0
"""Time for a replica to end after its requests have."""


class ReplicaOptions(BaseModel):
    """Arguments of the application; those of a model and a server are as for `lowlat serve`."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str = "default"
    served_model_name: str | None = None
    replicas: Annotated[int, Field(ge=1)] = 2
    threads: Annotated[int, Field(ge=1)] | None = None
    """Cores that each replica reserves; None: one replica per node, with all of its cores."""
    request_router: Literal["prefix", "round_robin", "power_of_two_choices"] = "prefix"
    gateways: Annotated[int, Field(ge=1)] = 1
    """Processes that take HTTP requests; all send a conversation to the same replica."""
    dtype: str = "bf16"
    cache: str = "auto"
    max_context: Annotated[int, Field(ge=2)] | None = None
    cache_memory: Annotated[float, Field(ge=0.001, allow_inf_nan=False)] | None = None
    """GiB of KV cache per replica."""
    speculate: bool = True
    lora: dict[str, str] = {}
    """Folders of LoRA adapters by name."""
    prefix_cache_dir: Path | None = None
    """Folder of the prefix cache on disk, which replicas of a node share."""
    max_queue: Annotated[int, Field(ge=1)] = 256
    drain_seconds: Annotated[float, Field(ge=0.0, le=86400.0)] = 30.0
    host: str = "127.0.0.1"
    """Address that Ray Serve listens on; any but a loopback address requires api_key_file."""
    api_key_file: Path | None = None
    allowed_hosts: tuple[str, ...] = ()

    def serve_config(self) -> ServeConfig:
        """The server's options within a replica. Raises UserError."""
        return ServeConfig(
            host=self.host,
            model_name=self.served_model_name,
            api_keys=() if self.api_key_file is None else read_keys(self.api_key_file),
            allowed_hosts=self.allowed_hosts,
            drain_seconds=self.drain_seconds,
        )
