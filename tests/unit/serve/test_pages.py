"""Static files, their headers, and the login form, without a browser."""

import re
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from starlette.applications import Starlette

from lowlat.serve.http import pages
from lowlat.serve.http.incoming import IncomingBodies
from lowlat.serve.http.pages import COOKIE, MAX_FORM_BYTES, cookie_value, login_page, page_routes

KEY = "a-key-of-this-test-0123456789"
OTHER = "another-key-of-this-test-9876"
FILES = sorted(
    path.relative_to(pages.FOLDER).as_posix() for path in pages.FOLDER.rglob("*") if path.is_file()
)
OWN = [name for name in FILES if not name.startswith("vendor/")]
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


pytestmark = pytest.mark.anyio


def client(*keys: str, base_url: str = "http://127.0.0.1:8000") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(
        Starlette(routes=page_routes(keys, bodies=IncomingBodies(max_slow=4)))
    )
    return httpx.AsyncClient(transport=transport, base_url=base_url)


async def test_every_file_is_served() -> None:
    """Each under its name with its type; none is left out and there is no other."""
    types = {
        "css": "text/css",
        "js": "text/javascript",
        "png": "image/png",
        "svg": "image/svg+xml",
        "txt": "text/plain",
        "webmanifest": "application/manifest+json",
        "woff2": "font/woff2",
    }
    async with client() as get:
        for name in FILES:
            response = await get.get(f"/static/{name}")
            kind = types.get(name.rpartition(".")[2])
            assert response.status_code == (404 if kind is None else 200), name
            if kind is not None:
                assert response.headers["Content-Type"].partition(";")[0] == kind
                assert response.content == Path(pages.FOLDER, name).read_bytes()
    assert len(page_routes(bodies=IncomingBodies(max_slow=4))) == 1 + sum(
        not name.endswith(".html") for name in FILES
    )


async def test_headers() -> None:
    """Nothing may run or be fetched but this server's own files, and nothing may frame the page."""
    async with client() as get:
        for path in ("/", "/static/app.js"):
            headers = (await get.get(path)).headers
            policy = dict(
                part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
            )
            assert policy["default-src"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert policy["font-src"] == policy["manifest-src"] == policy["img-src"] == "'self'"
            assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["require-trusted-types-for"] == "'script'"
            assert policy["trusted-types"] == "dompurify"
            assert "unsafe" not in headers["Content-Security-Policy"]
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert not any(name.startswith("access-control") for name in headers)


async def test_caching() -> None:
    """Cached files are revalidated, which costs nothing while they are unchanged."""
    async with client() as get:
        first = await get.get("/static/app.js")
        assert first.headers["Cache-Control"] == "private, no-cache"
        etag = first.headers["ETag"]
        for given in (etag, f'"x", {etag}', f"W/{etag}"):
            again = await get.get("/static/app.js", headers={"If-None-Match": given})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["ETag"] == etag
            assert "Content-Security-Policy" in again.headers
        other = await get.get("/static/app.js", headers={"If-None-Match": '"x"'})
        assert other.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static",
        "/static/index.html",
        "/static/login.html",
        "/static/../pages.py",
        "/static/..%2fpages.py",
        "/static/%2e%2e/%2e%2e/serve/pages.py",
        "/static//etc/passwd",
        "/static/app.js/",
        "/static/app.js%00.css",
        "/static/APP.JS",
        "//static/app.js",
        "/static/./app.js",
        "/static\\app.js",
        "/index.html",
    ],
)
async def test_no_other_path(path: str) -> None:
    """A path is compared with names; it never reaches the file system."""
    seen: list[dict[str, object]] = []
    app = Starlette(routes=page_routes(bodies=IncomingBodies(max_slow=4)))
    app.router.redirect_slashes = False

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, object]) -> None:
        seen.append(message)

    # As raw as a client can send it: httpx would tidy it up.
    decoded = re.sub("%([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), path)
    scope = {"type": "http", "method": "GET", "path": decoded, "raw_path": path.encode()}
    scope |= {"headers": [], "query_string": b"", "root_path": "", "http_version": "1.1"}
    await app(scope, receive, send)  # pyright: ignore[reportArgumentType]
    assert seen[0]["status"] == 404


async def test_methods() -> None:
    async with client(KEY) as get:
        assert (await get.head("/")).status_code == 200
        assert (await get.post("/")).status_code == 405
        assert (await get.get("/login")).status_code == 405


async def test_no_login_without_keys() -> None:
    async with client() as get:
        assert (await get.post("/login", data={"key": KEY})).status_code == 404


async def test_login() -> None:
    """The right key earns a cookie that scripts cannot read and that is not the key."""
    async with client(OTHER, KEY) as get:
        response = await get.post("/login", data={"key": f" {KEY} "})
        assert (response.status_code, response.headers["Location"]) == (303, "/")
        assert response.headers["Cache-Control"] == "no-store"
        cookie = next(c for c in response.headers.get_list("Set-Cookie") if c.startswith(COOKIE))
        assert cookie.startswith(f"{COOKIE}={cookie_value(KEY)};")
        assert {"HttpOnly", "Path=/", "SameSite=strict"} <= set(cookie.split("; "))
        assert "Secure" not in cookie
        assert KEY not in str(response.headers)
        response = await get.post("/logout")
        assert "Max-Age=0" in response.headers["Set-Cookie"]
    async with client(KEY, base_url="https://127.0.0.1") as get:
        response = await get.post("/login", data={"key": KEY})
        assert "Secure" in response.headers["Set-Cookie"]


@pytest.mark.parametrize("key", ["wrong", KEY[:-1], KEY + "x", KEY.upper(), "é", "\x00"])
async def test_wrong_key(key: str) -> None:
    async with client(KEY) as get:
        response = await get.post("/login", content=f"key={quote(key)}", headers=FORM)
    assert response.status_code == 401
    assert "Set-Cookie" not in response.headers
    assert "is invalid" in response.text
    assert key not in response.text or key == "\x00"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("", FORM["Content-Type"]),
        ("key=", FORM["Content-Type"]),
        ("key=%20", FORM["Content-Type"]),
        (f"key={KEY}&key={KEY}", FORM["Content-Type"]),
        (f"other={KEY}", FORM["Content-Type"]),
        (f"key={KEY}&a=1&b=2&c=3&d=4", FORM["Content-Type"]),
        ("key=\xff", FORM["Content-Type"]),
        (f"key={KEY}", "text/plain"),
        (f'{{"key": "{KEY}"}}', "application/json"),
    ],
)
async def test_invalid_login_forms(body: str, kind: str) -> None:
    """Anything but one short urlencoded form with one key is refused before a key is compared."""
    async with client(KEY) as get:
        response = await get.post(
            "/login", content=body.encode("latin-1"), headers={"Content-Type": kind}
        )
    assert response.status_code == 400
    assert "Set-Cookie" not in response.headers


async def test_a_login_form_above_the_limit() -> None:
    async with client(KEY) as get:
        body = f"key={KEY}" + "x" * MAX_FORM_BYTES
        response = await get.post("/login", content=body, headers=FORM)
    assert response.status_code == 413
    assert "larger than 4096 bytes" in response.text
    assert "Set-Cookie" not in response.headers


def test_login_page() -> None:
    """It needs no other file, so that none has to be open: its one style is named by its hash."""
    response = login_page("Try <i>again</i>.")
    text = bytes(response.body).decode()
    assert response.status_code == 401
    assert "Try &lt;i&gt;again&lt;/i&gt;." in text
    assert not re.search(r"<(script|link|img)|\ssrc=|url\(", text)
    assert "style-src 'sha256-" in response.headers["Content-Security-Policy"]
    assert response.headers["Cache-Control"] == "no-store"


def test_cookie_value() -> None:
    """It repeats for one key, differs between keys and does not show the key."""
    assert cookie_value(KEY) == cookie_value(KEY) != cookie_value(OTHER)
    assert re.fullmatch("[0-9a-f]{64}", cookie_value(KEY))


def test_page_asks_for_nothing_else() -> None:
    """No file of the page names another host, and none holds inline scripts or styles."""
    for name in (name for name in OWN if not name.endswith(".png")):
        text = Path(pages.FOLDER, name).read_text()
        hosts = set(re.findall(r"https?://[\w.]+", text)) - {"http://www.w3.org"}
        assert hosts == set(), name
        if name == "index.html":
            assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
        if name.endswith(".js"):
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function",
                text,
            )


def test_fonts() -> None:
    """Every font that a style sheet names is there, as woff2."""
    style = Path(pages.FOLDER, "vendor/katex.css").read_text()
    fonts = set(re.findall(r"url\(([^)]+)\)", style))
    assert fonts == {name.removeprefix("vendor/") for name in FILES if name.endswith(".woff2")}
    assert len(fonts) > 10
