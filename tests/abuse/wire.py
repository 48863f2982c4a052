"""Raw HTTP requests as bytes, one per connection, without a client library."""

import contextlib
import http.client
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HOST = "127.0.0.1"
JSON_HEADERS = {"Host": HOST, "Content-Type": "application/json"}
SECONDS = 60.0
"""Longer than anything here may take, on a machine with much else to do."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One response, read to its end."""

    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The object of an error, whose shape is checked."""
        assert self.headers["content-type"] == "application/json", self
        value = json.loads(self.body)
        if set(value) == {"error", "param", "code"}:  # Ollama's format
            value = {"error": {"type": "", "message": value.pop("error"), **value}}
        assert value.pop("type", "error") == "error", value  # Anthropic's has it
        assert set(value) == {"error"}, value
        error = value["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and 0 < len(error["message"]) <= 600, error
        assert "\n" not in error["message"], error
        assert isinstance(error["type"], str), error
        assert error["param"] is None or isinstance(error["param"], str), error
        return error


def request(
    method: str, target: str, headers: Mapping[str, str | bytes] | None = None, body: bytes = b""
) -> bytes:
    """The bytes of a request; Content-Length is added where there is a body."""
    given = dict({"Host": HOST} if headers is None else headers)
    if body and not {"content-length", "transfer-encoding"} & {name.lower() for name in given}:
        given["Content-Length"] = str(len(body))
    lines = [f"{method} {target} HTTP/1.1".encode("latin-1")]
    for name, value in given.items():
        lines.append(
            name.encode() + b": " + (value if isinstance(value, bytes) else value.encode())
        )
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def post(path: str, body: bytes, **more: str) -> bytes:
    """A JSON body for `path`; `more` are headers, with _ for -."""
    headers = {**JSON_HEADERS, **{name.replace("_", "-"): value for name, value in more.items()}}
    return request("POST", path, headers, body)


def exchange(port: int, data: bytes, *, method: str = "POST") -> Reply:
    """Send `data` and read one response to its end, also where it comes before all is sent."""
    with socket.create_connection((HOST, port), timeout=SECONDS) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        response = http.client.HTTPResponse(connection, method=method)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(status=response.status, headers=headers, body=response.read())


def call(port: int, path: str, value: object) -> Reply:
    """POST `value` as JSON."""
    return exchange(port, post(path, json.dumps(value).encode()))


def get(port: int, path: str, **headers: str) -> Reply:
    return exchange(port, request("GET", path, {"Host": HOST, **headers}), method="GET")
