"""Connection: uvicorn's HTTP/1.1 protocol with a time limit on headers and errors of our shape.

Owns what happens before there is a request: slow headers, and bytes that are no HTTP.
"""

import asyncio
import json
from collections.abc import Callable

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lowlat.serve.errors import error_object


def connection_class(header_seconds: int | float) -> type[H11Protocol]:
    """The protocol class for uvicorn; it makes one object for each connection."""

    class Connection(H11Protocol):
        """A client must finish a request's line and headers `header_seconds` after it begins.

        The time between requests is limited by uvicorn's keep-alive timeout.
        """

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            super().connection_made(transport)
            self._timer = self.loop.call_later(header_seconds, self._time_out)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._awaits_headers():
                self._stop_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(header_seconds, self._time_out)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this is no HTTP/1.1 request, or its headers are too large")

        def _awaits_headers(self) -> bool:
            return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _time_out(self) -> None:
            self._timer = None
            if not self.transport.is_closing():
                self._refuse(408, f"the headers did not arrive within {header_seconds:g} seconds")

        def _refuse(self, status: int, message: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_raw_error(self.conn.send, status, message))
            self.transport.close()

    return Connection


def _raw_error(encode: Callable[[h11.Event], bytes | None], status: int, message: str) -> bytes:
    """The bytes of an error response that ends its connection."""
    body = json.dumps(error_object(status, message)).encode()
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("connection", "close"),
    ]
    events = (
        h11.Response(status_code=status, headers=headers),
        h11.Data(data=body),
        h11.EndOfMessage(),
    )
    return b"".join(encode(event) or b"" for event in events)
