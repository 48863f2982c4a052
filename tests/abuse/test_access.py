"""Every route without valid credentials, over real connections.

Routes are asked of the application, so that a new one is covered when it is added.
"""

import json
from collections.abc import Iterator, Mapping

import pytest

from lowlat.serve.http.pages import COOKIE, cookie_value
from lowlat.serve.http.security import OPEN_PATHS

from .local import NAME, Local, listening
from .wire import HOST, Reply, exchange, request

KEY, OTHER = "k" * 32, "o" * 32
SENT: Mapping[str, str] = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def open_server() -> Iterator[Local]:
    """A server without keys."""
    with listening() as server:
        yield server


@pytest.fixture(scope="module")
def locked() -> Iterator[Local]:
    """A server with two keys."""
    with listening(api_keys=(KEY, OTHER)) as server:
        yield server


def ask(server: Local, method: str, path: str, headers: Mapping[str, str]) -> Reply:
    body = b"{}" if method == "POST" else b""
    given = {"Host": HOST, **(SENT if body else {}), **headers}
    return exchange(server.port, request(method, path, given, body), method=method)


def is_open(method: str, path: str) -> bool:
    """What needs no key: health and readiness, and what takes one."""
    return path in OPEN_PATHS or (method, path) == ("POST", "/login")


def check_refused(server: Local, reply: Reply, method: str, *statuses: int) -> None:
    """In the error shape, and without a word of the model."""
    assert reply.status in statuses, (method, reply)
    assert NAME.encode() not in reply.body
    assert not any(name.startswith("access-control") for name in reply.headers)
    if method != "HEAD" and reply.headers["content-type"] == "application/json":
        assert reply.error["message"]


WRONG_KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "another": {"Authorization": "Bearer " + "x" * 32},
    "one character more": {"Authorization": f"Bearer {KEY}k"},
    "one character less": {"Authorization": f"Bearer {KEY[:-1]}"},
    "one character else": {"Authorization": f"Bearer {KEY[:-1]}l"},
    "upper case": {"Authorization": f"Bearer {KEY.upper()}"},
    "both keys": {"Authorization": f"Bearer {KEY},{OTHER}"},
    "both keys, a blank": {"Authorization": f"Bearer {KEY} {OTHER}"},
    "a key with a zero": {"Authorization": f"Bearer {KEY}%00"},
    "no token": {"Authorization": "Bearer"},
    "blanks": {"Authorization": "Bearer    "},
    "nothing": {"Authorization": ""},
    "another scheme": {"Authorization": f"Basic {KEY}"},
    "a third scheme": {"Authorization": f"Token {KEY}"},
    "no scheme": {"Authorization": KEY},
    "a scheme of two words": {"Authorization": f"Bearer Bearer {KEY}"},
    "a tab": {"Authorization": f"Bearer\t{KEY}"},
    "null": {"Authorization": "Bearer null"},
    "a hash of the key": {"Authorization": f"Bearer {cookie_value(KEY)}"},
    "OpenAI's other header": {"api-key": KEY},
    "x-api-key, cut off": {"X-API-Key": KEY[:-1]},
    "a proxy's header": {"Proxy-Authorization": f"Bearer {KEY}"},
    "forwarded": {"X-Forwarded-For": "127.0.0.1", "X-Real-IP": "127.0.0.1"},
    "another path": {"X-Original-URL": "/health", "X-Rewrite-URL": "/health"},
    "the key as cookie": {"Cookie": f"{COOKIE}={KEY}"},
    "an empty cookie": {"Cookie": f"{COOKIE}="},
    "another cookie": {"Cookie": f"x={cookie_value(KEY)}"},
    "a cookie cut off": {"Cookie": f"{COOKIE}={cookie_value(KEY)[:-1]}"},
    "a quoted cookie": {"Cookie": f'{COOKIE}="{cookie_value(KEY)}"'},
    "a wrong key, a right cookie": {
        "Authorization": "Bearer x", "Cookie": f"{COOKIE}={cookie_value(KEY)}",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_no_route_opens_to_a_wrong_key(locked: Local, name: str) -> None:
    for method, path in locked.routes:
        reply = ask(locked, method, path, WRONG_KEYS[name])
        if is_open(method, path):
            assert reply.status == (200 if path in OPEN_PATHS else 400)
        else:
            check_refused(locked, reply, method, 401)


def test_all_routes_open_to_a_right_key(locked: Local) -> None:
    """Else the tests here would show nothing."""
    for method, path in locked.routes:
        for key in (KEY, OTHER):
            reply = ask(locked, method, path, {"Authorization": f"Bearer {key}"})
            # No response has the name that stands for it in a path.
            unknown = (404,) if "{" in path else ()
            assert reply.status in (200, 303, 400, *unknown), (method, path, reply)


def twisted(path: str) -> Iterator[str]:
    """Spellings of `path` that some server takes for it, by way of an open path or not."""
    yield from (f"/{path}", f"/.{path}", f"{path}/", f"{path}//", f"{path};", f"{path};x=1")
    yield from (f"/health/..{path}", f"/health/..;{path}", f"/health/%2e%2e{path}")
    yield from (f"/health%2f..{path}", f"/health%00{path}", f"/health;{path}", f"/health#{path}")
    yield from (f"/login/..{path}", f"/static/..{path}", f"{path}%00", f"{path}%20")
    yield from (f"{path}.json", path.upper() if path.upper() != path else "/V1", f"{path}%0a")
    yield from (f"http://{HOST}{path}", f"http://evil.example{path}", f"/..{path}", f"{path}/.")
    yield from (f"/%2f{path[1:]}", f"{path}%3fx", f"{path}\\", f"\\{path[1:]}")


@pytest.mark.slow
def test_no_route_opens_by_another_spelling(locked: Local) -> None:
    for method, path in locked.routes:
        for target in twisted(path):
            reply = ask(locked, method, target, {})
            check_refused(locked, reply, method, 401, 400)


def test_encoded_paths_are_those_they_stand_for(locked: Local) -> None:
    """The guard and the routes see the same path."""
    for method, path in locked.routes:
        target = "/" + "".join(f"%{ord(char):02x}" for char in path[1:])
        reply = ask(locked, method, target, {})
        if is_open(method, path):
            assert reply.status in (200, 400)
        else:
            check_refused(locked, reply, method, 401)


def test_without_keys_other_spellings_are_no_routes(open_server: Local) -> None:
    for method, path in open_server.routes:
        for target in twisted(path):
            reply = ask(open_server, method, target, {})
            assert reply.status in (400, 404, 405), (method, target, reply)


HOSTS = (
    "evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example",
    "127.0.0.1@evil.example", "evil.example#127.0.0.1", "127.0.0.1, evil.example", "192.168.1.7",
    "[2001:db8::1]", "[::ffff:192.168.1.7]", "0.0.0.0", "127.0.0.1:x", "127.0.0.1:123456", "[::1",
    "127.0.0.1/", "localhost\\x", "xn--localhost", "localhost.localdomain", "", "*", "null",
    "2130706433", "0x7f.1", "127.1", "a" * 300,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
def test_no_route_answers_to_a_foreign_host(open_server: Local, locked: Local, host: str) -> None:
    """Regression: DNS rebinding, with which a page reads from a server it has no key for."""
    for server, more in ((open_server, {}), (locked, {"Authorization": f"Bearer {KEY}"})):
        for method, path in server.routes:
            reply = ask(server, method, path, {**more, "Host": host})
            check_refused(server, reply, method, 403)


def test_no_route_answers_without_a_host(open_server: Local, locked: Local) -> None:
    for server in (open_server, locked):
        for method, path in server.routes:
            for version, status in ((b"1.1", 400), (b"1.0", 403)):
                data = b"%s %s HTTP/%s\r\n\r\n" % (method.encode(), path.encode(), version)
                reply = exchange(server.port, data, method=method)
                check_refused(server, reply, method, status)


def origins(port: int) -> tuple[str, ...]:
    return (
        "null", "", "*", "http://evil.example", f"http://evil.example:{port}", f"http://{HOST}",
        f"http://{HOST}:{port + 1}", f"http://localhost:{port}", f"http://{HOST}:{port}.evil.example",
        f"http://{HOST}:{port}@evil.example", f"http://x@{HOST}:{port}", f"http://{HOST}:{port}/",
        f"{HOST}:{port}", f"//{HOST}:{port}", f"file://{HOST}:{port}", "file://", "about:blank",
        f"ws://{HOST}:{port}", "chrome-extension://x", f"http://{HOST}:{port} http://evil.example",
        "data:,", f"ftp://{HOST}:{port}",
    )  # fmt: skip


@pytest.mark.slow
def test_no_route_answers_to_a_foreign_origin(open_server: Local, locked: Local) -> None:
    """Regression: pages of other sites that use the server behind the user's back."""
    for server, more in ((open_server, {}), (locked, {"Authorization": f"Bearer {KEY}"})):
        for origin in origins(server.port):
            headers = {**more, "Host": f"{HOST}:{server.port}", "Origin": origin}
            for method, path in server.routes:
                check_refused(server, ask(server, method, path, headers), method, 403)
            for method in ("OPTIONS", "PUT"):
                preflight = {**headers, "Access-Control-Request-Method": "POST"}
                check_refused(server, ask(server, method, "/", preflight), method, 403)


def test_the_own_origin_is_answered(open_server: Local) -> None:
    here = f"{HOST}:{open_server.port}"
    for method, path in open_server.routes:
        reply = ask(open_server, method, path, {"Host": here, "Origin": f"http://{here}"})
        unknown = (404,) if "{" in path else ()
        assert reply.status in (200, 400, *unknown), (method, path, reply)
        assert not any(name.startswith("access-control") for name in reply.headers)


def test_health_reports_nothing_but_itself(locked: Local) -> None:
    reply = ask(locked, "GET", "/health", {})
    assert json.loads(reply.body) == {"status": "ok"}


@pytest.mark.parametrize("part", ["digest", "cookie"])
def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Every key is compared, by hmac.compare_digest and by nothing else, whichever is right."""
    from lowlat.serve.config import ServeConfig
    from lowlat.serve.http import security

    class Unequal(bytes):
        """Bytes that no other comparison may touch."""

        def __eq__(self, other: object) -> bool:
            raise AssertionError("keys are compared by ==")

        __hash__ = bytes.__hash__

    compared: list[bytes] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append(bytes(right))
        return bytes(left) == bytes(right)

    monkeypatch.setattr(security.hmac, "compare_digest", compare)
    guard = security.SecurityMiddleware(lambda *_: None, ServeConfig(api_keys=(KEY, OTHER)))  # pyright: ignore
    for key in guard._keys:
        setattr(key, part, Unequal(getattr(key, part)))
    for given in (KEY, OTHER, "x" * 32):
        compared.clear()
        value = cookie_value(given) if part == "cookie" else given
        header = f"{COOKIE}={value}" if part == "cookie" else f"Bearer {given}"
        name = b"cookie" if part == "cookie" else b"authorization"
        found = guard._find([(name, header.encode())])
        assert (found is not None) == (given in (KEY, OTHER))
        assert len(compared) == 2
