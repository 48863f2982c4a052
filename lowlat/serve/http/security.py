"""Guard: who may reach the routes. Refuses by default; knows no route but the open ones.

Owns the checks of the headers' size and framing, of Host, Origin and key, on the path the router
sees. Sends no CORS headers, so that no page of another origin can read an answer.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lowlat.serve.config import ServeConfig, is_loopback
from lowlat.serve.http.errors import error_response
from lowlat.serve.http.login import COOKIE, LOGIN_PATH, cookie_value, login_page
from lowlat.serve.protocol import limits

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no key."""
PAGE_PATH = "/"
# The HTTP library measures only headers that do not come all at once.
_MAX_HEAD = limits.MAX_HEADER_BYTES

_HOST = re.compile(
    rb"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9_.-]{1,253}))(?::[0-9]{1,5})?"
)


class Guard:
    """ASGI middleware. Puts the key's cache namespace into
    scope["state"]["cache_namespace"]."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._keys = [_Key(key) for key in config.api_keys]
        self._is_wildcard = config.is_wildcard
        self._hosts = {name.lower().rstrip(".") for name in (config.host, *config.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            refusal = self._refusal(scope)
            await (self._app if refusal is None else refusal)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> Response | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        malformed = _check_head(scope, headers)
        if malformed is not None:
            return malformed
        hosts = [value for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self._is_known(hosts[0]):
            return error_response(
                403,
                "the Host header names no address of this server; start it with --allowed-host to "
                "allow another name",
                code="host_not_allowed",
            )
        origins = [value for name, value in headers if name == b"origin"]
        if any(not _is_same(origin, hosts[0]) for origin in origins):
            return error_response(
                403, "requests from pages of other origins are refused", code="origin_not_allowed"
            )
        return self._check_key(scope, headers)

    def _is_known(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match["six"] or match["name"]).decode("ascii").lower().rstrip(".")
        if name in self._hosts or is_loopback(name):
            return True
        # A page that a hostile name server sends here still has that server's name in Host.
        return self._is_wildcard and _is_literal(name)

    def _check_key(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> Response | None:
        state = scope.setdefault("state", {})
        state["cache_namespace"] = b""
        if not self._keys:
            return None
        key = self._find(headers)
        if key is not None:
            state["cache_namespace"] = key.cache_namespace
            return None
        path, method = scope["path"], scope["method"]
        if path in OPEN_PATHS or (path == LOGIN_PATH and method == "POST"):
            return None
        if path == PAGE_PATH and method in ("GET", "HEAD"):
            return login_page()
        return error_response(
            401,
            "a valid API key is needed: send 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _find(self, headers: list[tuple[bytes, bytes]]) -> "_Key | None":
        """The key of Authorization, or else of the chat page's cookie."""
        given = [value for name, value in headers if name == b"authorization"]
        if given:
            scheme, _, token = given[0].partition(b" ")
            is_bearer = len(given) == 1 and scheme.lower() == b"bearer"
            return self._match(hashlib.sha256(token.strip()).digest() if is_bearer else b"")
        cookies = [value for name, value in headers if name == b"cookie"]
        return self._match_cookie(_cookie(cookies))

    def _match(self, digest: bytes) -> "_Key | None":
        # All are compared, so that the time does not tell which one was near.
        found = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        return found[0] if found else None

    def _match_cookie(self, value: bytes) -> "_Key | None":
        found = [key for key in self._keys if hmac.compare_digest(value, key.cookie)]
        return found[0] if found else None


class _Key:
    """An API key as what is compared with it."""

    def __init__(self, key: str) -> None:
        self.digest = hashlib.sha256(key.encode("ascii")).digest()
        self.cookie = cookie_value(key).encode("ascii")
        self.cache_namespace = hmac.digest(key.encode("ascii"), b"lowlat prefix cache", "sha256")


def _check_head(scope: Scope, headers: list[tuple[bytes, bytes]]) -> Response | None:
    """A refusal of headers that are too large, or of which proxies may have made something else."""
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if target + sum(len(name) + len(value) + 4 for name, value in headers) > _MAX_HEAD:
        message = f"the request's line and headers are larger than {_MAX_HEAD} bytes"
        return error_response(431, message, headers={"Connection": "close"})
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        message = "Content-Length and Transfer-Encoding contradict each other; send one"
        return error_response(400, message, headers={"Connection": "close"})
    return None


def _cookie(headers: Iterable[bytes]) -> bytes:
    """Value of the chat page's cookie; b"" where there is none."""
    for header in headers:
        for pair in header.split(b";"):
            name, _, value = pair.strip().partition(b"=")
            if name == COOKIE.encode("ascii"):
                return value
    return b""


def _is_same(origin: bytes, host: bytes) -> bool:
    """Whether a page of `origin` was served by `host`; `null` never is."""
    scheme, _, rest = origin.lower().partition(b"://")
    return scheme in (b"http", b"https") and rest == host.lower()


def _is_literal(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
