"""Client address and API key fingerprint of a request, for limits and logs."""

from starlette.types import Scope

UNKNOWN_ADDRESS = "unknown"


def client_address(scope: Scope) -> str:
    """The address of the connection's other end: a client, or the proxy in front of the server."""
    client = scope.get("client")
    return str(client[0]) if client else UNKNOWN_ADDRESS


def key_fingerprint(scope: Scope) -> str | None:
    """The first 8 hexadecimal digits of the API key's SHA-256; None without a key."""
    return scope.get("state", {}).get("key_fingerprint")


def owners_of(scope: Scope) -> tuple[str, ...]:
    """The API key and the address, as names of whom a limit counts."""
    key = key_fingerprint(scope)
    address = f"address {client_address(scope)}"
    return (address,) if key is None else (address, f"key {key}")
