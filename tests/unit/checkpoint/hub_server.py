"""A local hub for tests: lists and serves one repository's files, with ranges, and misbehaves on
request.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from urllib.parse import unquote

COMMIT = "c" * 40


class HubServer(ThreadingHTTPServer):
    """Serves `files` (path -> content) as the model org/name."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.sent: list[tuple[str, int]] = []
        """Path and first byte of every download."""
        self.cut_after: int | None = None
        """Close the connection after this many bytes of a file."""
        self.stall = Event()
        """Wait for this after the first `cut_after` bytes, instead of closing."""
        self.stall.set()
        self.corrupt = False
        """Send other bytes than the checksum promises."""
        self.tokens: set[str | None] = set()
        """Authorization headers received."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        if "/org/name" in path:
            self.server.tokens.add(self.headers.get("Authorization"))
        if match := re.fullmatch(r"/api/models/org/name(/tree/.+|/revision/.+)?", path):
            is_tree = (match[1] or "").startswith("/tree")
            self._json(self._tree() if is_tree else self._info(), body)
        elif match := re.fullmatch(r"/org/name/resolve/[^/]+/(.+)", path):
            self._file(match[1], body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _info(self) -> object:
        siblings = [
            {"rfilename": name, "size": len(content)} for name, content in self.server.files.items()
        ]
        return {"id": "org/name", "sha": COMMIT, "siblings": siblings}

    def _tree(self) -> object:
        return [
            {
                "type": "file",
                "path": name,
                "size": len(content),
                "oid": "0" * 40,
                "lfs": {"oid": _digest(content), "size": len(content), "pointerSize": 9},
            }
            for name, content in self.server.files.items()
        ]

    def _json(self, value: object, body: bool) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _file(self, name: str, body: bool) -> None:
        if name not in self.server.files:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = self.server.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        content = whole[first:]
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{_digest(whole)}"')
        self.send_header("X-Linked-Etag", f'"{_digest(whole)}"')
        self.send_header("X-Linked-Size", str(len(whole)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if not body:
            return
        self.server.sent.append((name, first))
        sent = bytes(len(content)) if self.server.corrupt else content
        self.wfile.write(sent[: self.server.cut_after])
        if self.server.cut_after is not None:
            self.wfile.flush()
            self.server.stall.wait(60)
            self.close_connection = True


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[HubServer]:
    """The server, running."""
    server = HubServer(files)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
