"""The chat page: static files served from memory with their security and cache headers.

Decides nothing about access: `http.security` does. Login is in `http.login`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path, PurePath

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lowlat.serve.http.login import HTML, PAGE_HEADERS, Endpoint, login_routes

FOLDER = Path(__file__).parents[1] / "static"

_TYPES = {
    ".html": HTML,
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_CACHED = {"Cache-Control": "private, no-cache", "Vary": "Authorization, Cookie"}


def page_routes(keys: Sequence[str] = (), *, body_seconds: int | float = 30.0) -> list[Route]:
    """GET `/` and `/static/NAME`, one route per file; with `keys` also the login routes.

    Files are read once, here. A request's path is compared with their names and never reaches the
    file system.
    """
    files = _read_files()
    routes = [Route("/", _file_endpoint("index.html", files["index.html"]), methods=["GET"])]
    for name, body in files.items():
        if not name.endswith(".html"):
            routes.append(Route(f"/static/{name}", _file_endpoint(name, body), methods=["GET"]))
    return [*routes, *(login_routes(keys, body_seconds=body_seconds) if keys else ())]


def _read_files() -> dict[str, bytes]:
    """Every file of the folder `static`, by name."""
    found = sorted(FOLDER.iterdir())
    return {path.name: path.read_bytes() for path in found if path.suffix in _TYPES}


def _file_endpoint(name: str, body: bytes) -> Endpoint:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = PAGE_HEADERS | _CACHED | {"ETag": etag}
    media_type = _TYPES[PurePath(name).suffix]

    async def endpoint(request: Request) -> Response:
        known = request.headers.get("If-None-Match", "")
        if etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return endpoint
