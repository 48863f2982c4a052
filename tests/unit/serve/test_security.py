"""Access control: every route of the app with keys, hosts and origins."""

from collections.abc import Iterator

import pytest
from httpx import Response
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from lowlat.serve.http.pages import COOKIE, cookie_value

from .conftest import URL, MakeClient
from .fake_engine import NAME, FakeEngine

KEY, OTHER = "k" * 32, "o" * 32
WITH_KEY = {"Authorization": f"Bearer {KEY}"}


def routes_of(client: TestClient) -> list[tuple[str, str]]:
    """(method, path) of every route there is."""
    assert isinstance(client.app, Starlette)
    return [
        (method, route.path.replace("{id:path}", NAME))
        for route in client.app.routes
        if isinstance(route, Route)
        for method in sorted(route.methods or ())
    ]


def test_every_route_needs_a_key(engine: FakeEngine, make_client: MakeClient) -> None:
    """Regression: a new route without access control."""
    client = make_client(api_keys=(KEY, OTHER))
    routes = routes_of(client)
    assert len(routes) > 15
    bad_keys = [
        {},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": "Bearer "},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"Cookie": f"{COOKIE}={KEY}"},
        {"Cookie": f"{COOKIE}="},
        {"Cookie": f"other={cookie_value(KEY)}"},
        {"X-Api-Key": f"{KEY}x"},
        {"X-Api-Key": ""},
        {"X-Api-Key": f"Bearer {KEY}"},
        {"Authorization": "Bearer x", "X-Api-Key": KEY},
    ]
    for method, path in routes:
        for headers in bad_keys:
            response = client.request(method, path, headers=headers)
            if path in ("/health", "/ready"):
                assert response.status_code == 200
            elif (method, path) == ("POST", "/login"):
                assert response.status_code == 400
            else:
                assert response.status_code == 401, (method, path, headers)
                assert NAME not in response.text
    assert engine.asked == []


@pytest.mark.parametrize(
    "path",
    [
        "/health/../v1/models",
        "/health/..%2fv1/models",
        "/health%00",
        "/health/",
        "//health",
        "/HEALTH",
        "/health;/v1/models",
        "/./v1/models",
        "/v1/models/",
        "/v1//models",
        "/%76%31/models",
        "/static/..%2f..%2fconfig.py",
        "/login/../v1/models",
        "/nothing",
    ],
)
def test_path_tricks_open_nothing(make_client: MakeClient, path: str) -> None:
    client = make_client(api_keys=(KEY,))
    for method in ("GET", "POST"):
        response = client.request(method, URL + path)
        assert response.status_code == 401
        assert "error" in response.json()


def test_a_key_opens(make_client: MakeClient) -> None:
    client = make_client(api_keys=(OTHER, KEY))
    for headers in (
        WITH_KEY,
        {"Authorization": f"bearer {KEY}"},
        {"Authorization": f"Bearer  {KEY} "},
        {"Cookie": f"a=b; {COOKIE}={cookie_value(KEY)}"},
        {"X-Api-Key": KEY},
    ):
        assert client.get("/v1/models", headers=headers).status_code == 200


def test_a_wrong_key_is_not_replaced_by_a_cookie(make_client: MakeClient) -> None:
    headers = {"Authorization": "Bearer x", "Cookie": f"{COOKIE}={cookie_value(KEY)}"}
    assert make_client(api_keys=(KEY,)).get("/v1/models", headers=headers).status_code == 401


def test_two_authorizations_are_refused(make_client: MakeClient) -> None:
    headers = [("Authorization", "Bearer x"), ("Authorization", f"Bearer {KEY}")]
    client = make_client(api_keys=(KEY,))
    assert client.get("/v1/models", headers=headers).status_code == 401
    assert client.get("/v1/models", headers=headers[::-1]).status_code == 401


def test_refusals_ask_for_a_key(make_client: MakeClient) -> None:
    response = make_client(api_keys=(KEY,)).get("/v1/models")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_page_without_a_key_is_the_login_form(make_client: MakeClient) -> None:
    client = make_client(api_keys=(KEY,))
    response = client.get("/")
    assert response.status_code == 401
    assert "<form" in response.text
    assert client.get("/", headers=WITH_KEY).status_code == 200


def test_logging_in_opens_the_page(make_client: MakeClient) -> None:
    client = make_client(api_keys=(KEY,))
    answer = client.post("/login", data={"key": KEY}, follow_redirects=False)
    assert answer.status_code == 303
    assert client.get("/v1/models").status_code == 200


def test_each_key_has_a_salt_of_its_own(make_client: MakeClient, engine: FakeEngine) -> None:
    """Regression: one client seeing by the time of an answer what another has asked."""
    client = make_client(api_keys=(KEY, OTHER))
    body = {"model": NAME, "prompt": "x"}
    cookie = {"Cookie": f"{COOKIE}={cookie_value(KEY)}"}
    for headers in (WITH_KEY, {"Authorization": f"Bearer {OTHER}"}, WITH_KEY, cookie):
        assert client.post("/v1/completions", json=body, headers=headers).status_code == 200
    first, second, third, fourth = (asked.cache_namespace for asked in engine.asked)
    assert first == third == fourth != second
    assert len(first) == 32
    assert KEY.encode() not in first


def refused_by_every_route(
    client: TestClient, headers: dict[str, str]
) -> Iterator[tuple[str, Response]]:
    """Method and answer of every route, all of them 403."""
    for method, path in routes_of(client):
        response = client.request(method, path, headers=headers)
        assert response.status_code == 403, (method, path)
        yield method, response


HOSTS_REFUSED = [
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "localhost@evil.example",
    "evil.example:8000",
    "192.168.1.7",
    "[2001:db8::1]",
    "127.0.0.1:x",
    "127.0.0.1, evil.example",
    "127.0.0.1/",
    "",
    " ",
]


@pytest.mark.parametrize("host", HOSTS_REFUSED)
def test_foreign_hosts_are_refused(client: TestClient, host: str) -> None:
    """Regression: DNS rebinding, by which a foreign name leads to this server."""
    for method, response in refused_by_every_route(client, {"Host": host}):
        assert method == "HEAD" or "host_not_allowed" in response.text


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:9999", "localhost", "LocalHost:80", "[::1]:8000", "127.1.2.3"]
)
def test_loopback_hosts_are_allowed(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_more_hosts_can_be_allowed(make_client: MakeClient) -> None:
    client = make_client(host="0.0.0.0", api_keys=(KEY,), allowed_hosts=("llm.example", "10.0.0.9"))
    for host in ("llm.example", "LLM.example.:443", "10.0.0.9", "192.168.1.7", "[fe80::1]"):
        headers = {**WITH_KEY, "Host": host}
        assert client.get("/v1/models", headers=headers).status_code == 200, host
    headers = {**WITH_KEY, "Host": "evil.example"}
    assert client.get("/v1/models", headers=headers).status_code == 403


def test_two_hosts_are_refused(client: TestClient) -> None:
    headers = [("Host", "127.0.0.1"), ("Host", "evil.example")]
    assert client.get("/v1/models", headers=headers).status_code == 403


ORIGINS_REFUSED = [
    "null",
    "http://evil.example",
    "https://127.0.0.1.evil.example",
    "http://127.0.0.1:9999",
    "http://localhost:8000",
    "file://",
    "127.0.0.1:8000",
    "chrome-extension://abc",
    "",
    "*",
]


@pytest.mark.parametrize("origin", ORIGINS_REFUSED)
def test_foreign_origins_are_refused(client: TestClient, origin: str) -> None:
    """Regression: pages of other sites that use the server behind the user's back."""
    for _, response in refused_by_every_route(client, {"Origin": origin}):
        assert not any("access-control" in name for name in response.headers)


def test_the_own_origin_is_allowed(client: TestClient) -> None:
    for origin in (URL, "HTTP://127.0.0.1:8000", "https://127.0.0.1:8000"):
        response = client.get("/v1/models", headers={"Origin": origin})
        assert response.status_code == 200
        assert not any("access-control" in name for name in response.headers)


def test_preflight_requests_are_refused(client: TestClient) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert client.options("/v1/completions", headers=headers).status_code == 403
    assert client.options("/v1/completions").status_code == 405


def test_websockets_are_refused(client: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/models"):
        pass
