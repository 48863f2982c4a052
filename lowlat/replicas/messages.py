"""Messages between gateway and replicas: an HTTP request with its prefix, a response's head."""

from dataclasses import dataclass

from lowlat.replicas.prefix import Prefix


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaRequest:
    """An HTTP request to a replica."""

    scope: dict[str, object]
    """Fields of the ASGI scope that can be pickled."""
    body: bytes
    prefix: Prefix
    tried: tuple[str, ...] = ()
    """Replicas that have refused it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseHead:
    """The first message of a response; more parts of its body follow as bytes."""

    replica: str
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    """The first part of the body, which ends the time in which the request may be repeated."""
