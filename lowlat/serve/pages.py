"""The chat page as routes: static files held in memory, the login form, the headers of both.

Owns which files are served and under which headers, and how a browser trades an API key for a
cookie. Does not decide who may see a page: that is the app's guard, which refuses by default. The
guard answers a refused GET of `/` with `login_page()` and lets POST `/login` through.
"""

import base64
import hashlib
import hmac
import html
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path, PurePath
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from lowlat.serve.body import read_body
from lowlat.serve.protocol.failure import RequestError

COOKIE = "lowlat_key"
MARK = "lowlat_login"
"""A cookie without a secret: tells the page's scripts, which cannot read COOKIE, of it."""
COOKIE_SECONDS = 30 * 24 * 3600
MAX_FORM_BYTES = 4096
FOLDER = Path(__file__).with_name("static")

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {style}; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY.format(style="'self'"),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer a browser would send `Origin: null` with the login form.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_KEPT = {"Cache-Control": "private, no-cache", "Vary": "Authorization, Cookie"}
_NEVER_KEPT = {"Cache-Control": "no-store"}

_Endpoint = Callable[[Request], Awaitable[Response]]


def page_routes(keys: Sequence[str] = (), *, body_seconds: int | float = 30.0) -> list[Route]:
    """GET `/` and `/static/NAME`, one route per file; with `keys` also POST `/login`, whose form
    has to arrive within `body_seconds`, and `/logout`.

    The files are read once, here: a request's path is compared with their names and never
    reaches the file system.
    """
    files = _read_files()
    routes = [Route("/", _file_endpoint("index.html", files["index.html"]), methods=["GET"])]
    for name, body in files.items():
        if not name.endswith(".html"):
            routes.append(Route(f"/static/{name}", _file_endpoint(name, body), methods=["GET"]))
    if keys:
        routes.append(Route("/login", _login_endpoint(tuple(keys), body_seconds), methods=["POST"]))
        routes.append(Route("/logout", _logout, methods=["POST"]))
    return routes


def cookie_value(key: str) -> str:
    """What the cookie `COOKIE` of a browser that knows `key` holds; the key cannot be read off it.

    It depends on the key alone: it outlives a restart and ends when the key is taken away.
    """
    return hmac.new(key.encode(), b"lowlat chat page", hashlib.sha256).hexdigest()


def login_page(message: str = "", *, status: int = 401) -> Response:
    """The form that asks for an API key; `message` says what was wrong."""
    return Response(
        _LOGIN_TEXT.replace("{{message}}", html.escape(message)),
        status_code=status,
        media_type=_TYPES[".html"],
        headers=_HEADERS | _NEVER_KEPT | {"Content-Security-Policy": _LOGIN_POLICY},
    )


def _read_files() -> dict[str, bytes]:
    """Every file of the folder `static`, by name."""
    found = sorted(FOLDER.iterdir())
    return {path.name: path.read_bytes() for path in found if path.suffix in _TYPES}


def _file_endpoint(name: str, body: bytes) -> _Endpoint:
    etag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = _HEADERS | _KEPT | {"ETag": etag}
    media_type = _TYPES[PurePath(name).suffix]

    async def endpoint(request: Request) -> Response:
        known = request.headers.get("If-None-Match", "")
        if etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type=media_type, headers=headers)

    return endpoint


def _login_endpoint(keys: tuple[str, ...], body_seconds: int | float) -> _Endpoint:
    async def login(request: Request) -> Response:
        try:
            given = await _key_from_form(request, body_seconds)
        except RequestError as error:
            return login_page(f"Send the form again: {error.message}.", status=error.status)
        if given is None:
            return login_page("Send the form with an API key.", status=400)
        # Every key is compared, in constant time: the answer takes as long whichever it is.
        known = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if not any(known):
            return login_page("That key is not known to this server.")
        response = RedirectResponse("/", status_code=303, headers=_NEVER_KEPT)
        for name, value in ((COOKIE, cookie_value(given)), (MARK, "1")):
            response.set_cookie(
                name,
                value,
                max_age=COOKIE_SECONDS,
                path="/",
                secure=request.url.scheme == "https",
                httponly=name == COOKIE,
                samesite="strict",
            )
        return response

    return login


async def _logout(request: Request) -> Response:
    response = RedirectResponse("/", status_code=303, headers=_NEVER_KEPT)
    for name in (COOKIE, MARK):
        response.delete_cookie(name, path="/", httponly=name == COOKIE, samesite="strict")
    return response


async def _key_from_form(request: Request, seconds: int | float) -> str | None:
    """The field `key` of an urlencoded form; None for anything else. As `read_body`, raises
    RequestError for a form that is larger than MAX_FORM_BYTES or comes too slowly.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        return None
    body = await read_body(
        request.receive, request.headers, max_bytes=MAX_FORM_BYTES, seconds=seconds
    )
    try:
        fields = parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=4)
    except ValueError:
        return None
    values = fields.get("key", [])
    return values[0].strip() if len(values) == 1 and values[0].strip() else None


# Without a key no other file may be fetched, so the form carries its style sheet in itself; the
# policy names that one sheet by its hash.
_LOGIN_TEXT = _read_files()["login.html"].decode()
_LOGIN_STYLE = "".join(re.findall(r"<style>(.*?)</style>", _LOGIN_TEXT, re.DOTALL))
_LOGIN_HASH = base64.b64encode(hashlib.sha256(_LOGIN_STYLE.encode()).digest()).decode()
_LOGIN_POLICY = _POLICY.format(style=f"'sha256-{_LOGIN_HASH}'")
