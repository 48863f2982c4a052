"""Who sends a request: client address and API key fingerprint, for limits and logs."""

import hashlib

from starlette.types import Scope

UNKNOWN_ADDRESS = "unknown"


def client_address(scope: Scope) -> str:
    """The address of the connection's other end: a client, or the proxy in front of the server."""
    client = scope.get("client")
    return str(client[0]) if client else UNKNOWN_ADDRESS


def key_fingerprint(scope: Scope) -> str | None:
    """8 hexadecimal digits that identify the API key and do not reveal it; None without a key."""
    namespace: bytes = scope.get("state", {}).get("cache_namespace", b"")
    return hashlib.sha256(namespace).hexdigest()[:8] if namespace else None


def owners_of(scope: Scope) -> tuple[str, ...]:
    """The API key and the address, as names of whom a limit counts."""
    key = key_fingerprint(scope)
    address = f"address {client_address(scope)}"
    return (address,) if key is None else (address, f"key {key}")
