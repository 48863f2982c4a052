"""The chat page: static files with their headers, and login with an API key by form and cookie.

Decides nothing about access: `http.security` does, and answers a refused GET of `/` with
`login_page()`.
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

from lowlat.serve.http.body import read_body
from lowlat.serve.http.clients import client_address, owners_of
from lowlat.serve.http.incoming import IncomingBodies
from lowlat.serve.http.login_throttle import LoginThrottle
from lowlat.serve.protocol.errors import RequestError

COOKIE = "lowlat_key"
LOGIN_FLAG = "lowlat_login"
"""A cookie without a secret: it shows the page's scripts, which cannot read COOKIE, a logged-in
browser."""
COOKIE_SECONDS = 30 * 24 * 3600
MAX_FORM_BYTES = 4096
LOGIN_PATH = "/login"
FOLDER = Path(__file__).parents[1] / "static"

HTML = "text/html; charset=utf-8"
# Content Security Policy (CSP): the page loads only its own files and connects to this server only.
# Of its scripts only the sanitizer may parse HTML.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src {style}; img-src 'self'; font-src 'self'; "
    "manifest-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types dompurify"
)
PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY.format(style="'self'"),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer a browser would send `Origin: null` with the login form.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
_NO_STORE = {"Cache-Control": "no-store"}
_TYPES = {
    ".html": HTML,
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
    ".woff2": "font/woff2",
}
_CACHED = {"Cache-Control": "private, no-cache", "Vary": "Authorization, Cookie"}

Endpoint = Callable[[Request], Awaitable[Response]]


def page_routes(
    keys: Sequence[str] = (), *, bodies: IncomingBodies, body_seconds: int | float = 30.0
) -> list[Route]:
    """GET `/` and `/static/NAME`, one route per file; with `keys` also POST `/login` and
    `/logout`. The login form must arrive within `body_seconds`.

    Files are read once, here. A request's path is compared with their names and never reaches the
    file system.
    """
    files = _read_files()
    routes = [Route("/", _file_endpoint("index.html", files["index.html"]), methods=["GET"])]
    for name, body in files.items():
        if not name.endswith(".html"):
            routes.append(Route(f"/static/{name}", _file_endpoint(name, body), methods=["GET"]))
    if keys:
        login = _login_endpoint(tuple(keys), bodies, body_seconds)
        routes.append(Route(LOGIN_PATH, login, methods=["POST"]))
        routes.append(Route("/logout", _logout, methods=["POST"]))
    return routes


def _read_files() -> dict[str, bytes]:
    found = sorted(path for path in FOLDER.rglob("*") if path.suffix in _TYPES)
    return {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in found}


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


def cookie_value(key: str) -> str:
    """Value of the cookie `COOKIE` for an API key; the key cannot be derived from it.

    The value depends on the key alone: a login survives a restart and ends when the key is removed.
    """
    return hmac.new(key.encode(), b"lowlat chat page", hashlib.sha256).hexdigest()


def login_page(message: str = "", *, status: int = 401, retry_after: int | None = None) -> Response:
    """The form for an API key; `message` explains why a login failed."""
    retry = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Response(
        _LOGIN_TEXT.replace("{{message}}", html.escape(message)),
        status_code=status,
        media_type=HTML,
        headers=PAGE_HEADERS | _NO_STORE | {"Content-Security-Policy": _LOGIN_POLICY} | retry,
    )


def _login_endpoint(
    keys: tuple[str, ...], bodies: IncomingBodies, body_seconds: int | float
) -> Endpoint:
    throttle = LoginThrottle()

    async def login(request: Request) -> Response:
        address = client_address(request.scope)
        # Before the key is compared: the status would reveal the right one.
        if wait := throttle.wait_seconds(address):
            message = f"Too many failed logins. Try again in {wait} s."
            return login_page(message, status=429, retry_after=wait)
        try:
            given = await _key_from_form(request, bodies, body_seconds)
        except RequestError as error:
            return login_page(f"Send the form again: {error.message}.", status=error.status)
        if given is None:
            return login_page("Send the form with an API key.", status=400)
        # Constant time: every key is compared, whichever matches.
        known = [hmac.compare_digest(given.encode(), key.encode()) for key in keys]
        if not any(known):
            throttle.add_failure(address)
            return login_page("The API key is invalid. Check it and log in again.")
        response = RedirectResponse("/", status_code=303, headers=_NO_STORE)
        for name, value in ((COOKIE, cookie_value(given)), (LOGIN_FLAG, "1")):
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
    response = RedirectResponse("/", status_code=303, headers=_NO_STORE)
    for name in (COOKIE, LOGIN_FLAG):
        response.delete_cookie(name, path="/", httponly=name == COOKIE, samesite="strict")
    return response


async def _key_from_form(
    request: Request, bodies: IncomingBodies, seconds: int | float
) -> str | None:
    """The field `key` of a urlencoded form; None for anything else.

    Raises RequestError, as `read_body` does, for a form above MAX_FORM_BYTES or one that arrives
    too slowly.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        return None
    body = await read_body(
        request.receive,
        request.headers,
        max_bytes=MAX_FORM_BYTES,
        seconds=seconds,
        bodies=bodies,
        owners=owners_of(request.scope),
    )
    try:
        fields = parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=4)
    except ValueError:
        return None
    values = fields.get("key", [])
    return values[0].strip() if len(values) == 1 and values[0].strip() else None


# Without a key the browser may fetch no other file, so the form embeds its style sheet, which the
# Content-Security-Policy allows by its hash.
_LOGIN_TEXT = (FOLDER / "login.html").read_text(encoding="utf-8")
_LOGIN_STYLE = "".join(re.findall(r"<style>(.*?)</style>", _LOGIN_TEXT, re.DOTALL))
_LOGIN_HASH = base64.b64encode(hashlib.sha256(_LOGIN_STYLE.encode()).digest()).decode()
_LOGIN_POLICY = _POLICY.format(style=f"'sha256-{_LOGIN_HASH}'")
