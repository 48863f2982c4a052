"""Failed logins are throttled per address."""

import pytest
from starlette.testclient import TestClient

from lowlat.serve.http import login_throttle
from lowlat.serve.http.login_throttle import MAX_FAILURES, WINDOW_SECONDS, LoginThrottle

from .conftest import MakeClient

KEY = "k" * 20


def test_failures_of_one_address() -> None:
    now = 0.0
    throttle = LoginThrottle(lambda: now)
    for _ in range(MAX_FAILURES):
        assert throttle.wait_seconds("1.2.3.4") == 0
        throttle.add_failure("1.2.3.4")
        now += 1.0
    assert throttle.wait_seconds("1.2.3.4") == WINDOW_SECONDS - MAX_FAILURES
    assert throttle.wait_seconds("1.2.3.5") == 0
    now = WINDOW_SECONDS - 0.5
    assert throttle.wait_seconds("1.2.3.4") == 1
    now = WINDOW_SECONDS
    assert throttle.wait_seconds("1.2.3.4") == 0
    throttle.add_failure("1.2.3.4")
    assert throttle.wait_seconds("1.2.3.4") == 1, "the second failure of the window"


def test_addresses_of_one_network_count_together() -> None:
    throttle = LoginThrottle(lambda: 0.0)
    for last in range(MAX_FAILURES):
        throttle.add_failure(f"2001:db8::{last}")
    assert throttle.wait_seconds("2001:db8::ffff%eth0") > 0
    assert throttle.wait_seconds("2001:db8:0:1::1") == 0
    for last in range(MAX_FAILURES):
        throttle.add_failure(f"::ffff:1.2.3.{last}")
    assert throttle.wait_seconds("::ffff:1.2.3.99") == 0


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login_throttle, "MAX_ADDRESSES", 3)
    throttle = LoginThrottle(lambda: 0.0)
    for address in ("a", "b", "c", "a", "d"):
        throttle.add_failure(address)
    assert list(throttle._failures) == ["c", "a", "d"]


def login(client: TestClient, key: str) -> tuple[int, str | None]:
    response = client.post("/login", data={"key": key}, follow_redirects=False)
    return response.status_code, response.headers.get("retry-after")


def test_the_login_page_is_throttled(make_client: MakeClient) -> None:
    """Regression: keys that a program may guess as fast as the server answers."""
    client = make_client(api_keys=(KEY,))
    assert login(client, KEY) == (303, None)
    for _ in range(MAX_FAILURES):
        assert login(client, "wrong") == (401, None)
    # Also the right key, or the answer would tell which one it is.
    status, wait = login(client, KEY)
    assert status == 429 and wait is not None and 1 <= int(wait) <= WINDOW_SECONDS
    # Requests with a key in their header are not affected.
    headers = {"Authorization": f"Bearer {KEY}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
