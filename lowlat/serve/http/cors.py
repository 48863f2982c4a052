"""CORS: pages of the origins that --allowed-origin lists may call the API and read its responses.

Preflights are answered without an API key. Cookies stay the chat page's own: no response allows
credentials, so pages of other origins send the key as a header.
"""

import re
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import Message, Send

from lowlat.serve.protocol.hints import HEADER

METHODS = "GET, POST, DELETE"
MAX_AGE = 600
"""Seconds for which a browser may remember a preflight."""
EXPOSED = f"x-request-id, retry-after, {HEADER}"
_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}( ?, ?[A-Za-z0-9-]{1,64}){0,63}")


class Cors:
    """The allowed origins; empty: no page of another origin."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.encode("ascii") for origin in origins)

    def allows(self, origin: bytes) -> bool:
        return origin.lower() in self._origins

    def preflight(self, method: str, headers: list[tuple[bytes, bytes]]) -> Response | None:
        """The response to a preflight of an allowed origin; None: the request is none."""
        given = dict(headers)
        if method != "OPTIONS" or b"access-control-request-method" not in given:
            return None
        answer = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Max-Age": f"{MAX_AGE}"}
        names = given.get(b"access-control-request-headers", b"").decode("latin-1")
        if _NAMES.fullmatch(names):
            answer["Access-Control-Allow-Headers"] = names
        return Response(status_code=204, headers=answer)

    def sending(self, send: Send, origin: bytes) -> Send:
        """`send`, with headers that let pages of `origin` read the response."""
        headers = [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", EXPOSED.encode("ascii")),
            (b"vary", b"Origin"),
        ]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        return send_with_headers
