"""Access control middleware: header size and framing, Host, Origin and API key checks.

Refuses by default: only OPEN_PATHS and the login need no key. Without --allowed-origin no CORS
headers are sent, so pages of other origins cannot read responses.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from lowlat.serve.config import ServeConfig, is_address, is_loopback
from lowlat.serve.http.cors import Cors
from lowlat.serve.http.errors import error_response
from lowlat.serve.http.pages import COOKIE, LOGIN_PATH, cookie_value, login_page
from lowlat.serve.protocol import limits

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Paths that require no API key: orchestrators probe them."""
PAGE_PATH = "/"
FINGERPRINT_DIGITS = 8
"""Hexadecimal digits of an API key's SHA-256 that identify it in logs."""
# h11 checks the size only of headers that arrive in several pieces.
_MAX_HEAD = limits.MAX_HEADER_BYTES

_HOST = re.compile(
    rb"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45})\]|(?P<name>[A-Za-z0-9_.-]{1,253}))(?::[0-9]{1,5})?"
)


class SecurityMiddleware:
    """ASGI middleware. Sets cache_namespace, which is unique to the API key, and key_fingerprint in
    scope["state"].
    """

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._keys = [_Key(key) for key in config.api_keys]
        self._is_wildcard = config.is_wildcard
        self._cors = Cors(config.allowed_origins)
        self._hosts = {name.lower().rstrip(".") for name in (config.host, *config.allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            origins = [value for name, value in scope["headers"] if name == b"origin"]
            if len(origins) == 1 and self._cors.allows(origins[0]):
                send = self._cors.sending(send, origins[0])
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
                "the Host header is not an address of this server; allow it with --allowed-host",
                code="host_not_allowed",
            )
        origins = [value for name, value in headers if name == b"origin"]
        is_allowed = len(origins) == 1 and self._cors.allows(origins[0])
        if is_allowed and (preflight := self._cors.preflight(scope["method"], headers)):
            return preflight
        if not is_allowed and any(not _is_same(origin, hosts[0]) for origin in origins):
            return error_response(
                403,
                "requests from other origins are not allowed; allow them with --allowed-origin",
                code="origin_not_allowed",
            )
        return self._check_key(scope, headers)

    def _is_known(self, host: bytes) -> bool:
        match = _HOST.fullmatch(host)
        if match is None:
            return False
        name = (match["six"] or match["name"]).decode("ascii").lower().rstrip(".")
        if name in self._hosts or is_loopback(name):
            return True
        # DNS rebinding: a page redirected here by a hostile name server still sends that name.
        return self._is_wildcard and is_address(name)

    def _check_key(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> Response | None:
        state = scope.setdefault("state", {})
        state["cache_namespace"] = b""
        if not self._keys:
            return None
        key = self._find(headers)
        if key is not None:
            state["cache_namespace"] = key.cache_namespace
            state["key_fingerprint"] = key.digest.hex()[:FINGERPRINT_DIGITS]
            return None
        path, method = scope["path"], scope["method"]
        if path in OPEN_PATHS or (path == LOGIN_PATH and method == "POST"):
            return None
        if path == PAGE_PATH and method in ("GET", "HEAD"):
            return login_page()
        return error_response(
            401,
            "a valid API key is required: send 'Authorization: Bearer KEY'",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def _find(self, headers: list[tuple[bytes, bytes]]) -> "_Key | None":
        """The API key in the Authorization header, else in x-api-key (Anthropic's clients), else
        in the chat page's cookie.
        """
        given = [value for name, value in headers if name == b"authorization"]
        if given:
            scheme, _, token = given[0].partition(b" ")
            is_bearer = len(given) == 1 and scheme.lower() == b"bearer"
            return self._match(hashlib.sha256(token.strip()).digest() if is_bearer else b"")
        given = [value for name, value in headers if name == b"x-api-key"]
        if given:
            is_one = len(given) == 1
            return self._match(hashlib.sha256(given[0].strip()).digest() if is_one else b"")
        cookies = [value for name, value in headers if name == b"cookie"]
        return self._match_cookie(_cookie(cookies))

    def _match(self, digest: bytes) -> "_Key | None":
        # Against timing attacks all keys are compared: the response time does not depend on which
        # one matches.
        found = [key for key in self._keys if hmac.compare_digest(digest, key.digest)]
        return found[0] if found else None

    def _match_cookie(self, value: bytes) -> "_Key | None":
        found = [key for key in self._keys if hmac.compare_digest(value, key.cookie)]
        return found[0] if found else None


class _Key:
    """An API key as digests for comparison."""

    def __init__(self, key: str) -> None:
        self.digest = hashlib.sha256(key.encode("ascii")).digest()
        self.cookie = cookie_value(key).encode("ascii")
        self.cache_namespace = hmac.digest(key.encode("ascii"), b"lowlat prefix cache", "sha256")


def _check_head(scope: Scope, headers: list[tuple[bytes, bytes]]) -> Response | None:
    """Refuse headers that are too large or allow request smuggling through proxies."""
    target = len(scope["raw_path"]) + len(scope["query_string"])
    if target + sum(len(name) + len(value) + 4 for name, value in headers) > _MAX_HEAD:
        message = f"the request's line and headers are larger than {_MAX_HEAD} bytes"
        return error_response(431, message, headers={"Connection": "close"})
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
        message = "Content-Length and Transfer-Encoding contradict each other; send one"
        return error_response(400, message, headers={"Connection": "close"})
    return None


def _cookie(headers: Iterable[bytes]) -> bytes:
    """Value of the chat page's cookie; b"" without one."""
    for header in headers:
        for pair in header.split(b";"):
            name, _, value = pair.strip().partition(b"=")
            if name == COOKIE.encode("ascii"):
                return value
    return b""


def _is_same(origin: bytes, host: bytes) -> bool:
    """Whether `origin` is the origin of `host`; `null` never is."""
    scheme, _, rest = origin.lower().partition(b"://")
    return scheme in (b"http", b"https") and rest == host.lower()
