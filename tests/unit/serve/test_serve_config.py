"""Validation of ServeConfig."""

from pathlib import Path
from typing import Any

import pytest

from lowlat.serve.config import ServeConfig, is_exposed, is_loopback, read_keys
from lowlat.utils.errors import UserError

KEY = "k" * 32


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.nip.io"]
)
def test_a_public_address_needs_a_key(host: str) -> None:
    with pytest.raises(UserError, match="--api-key-file"):
        ServeConfig(host=host)
    ServeConfig(host=host, api_keys=(KEY,))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_none(host: str) -> None:
    assert is_loopback(host)
    ServeConfig(host=host)


@pytest.mark.parametrize("key", ["", "short", "with space" * 3, "ü" * 20, "k" * 600, "tab\t" * 10])
def test_weak_keys_are_refused_without_showing_them(key: str) -> None:
    with pytest.raises(UserError, match="API key 2 must have") as caught:
        ServeConfig(api_keys=(KEY, key))
    assert not key or key not in str(caught.value)


def test_keys_are_not_shown() -> None:
    """Regression: keys in logs and tracebacks by way of repr."""
    assert KEY not in repr(ServeConfig(api_keys=(KEY,)))


@pytest.mark.parametrize(
    "option",
    [
        {"port": -1},
        {"port": 65536},
        {"max_body_bytes": 10},
        {"workers": 0},
        {"max_requests": 0},
        {"body_seconds": 0.0},
        {"drain_seconds": float("nan")},
        {"request_seconds": float("inf")},
        {"keep_alive_seconds": 0},
        {"host": "not a host"},
        {"allowed_hosts": ("*",)},
    ],
)
def test_ranges_are_named(option: dict[str, Any]) -> None:
    (name,) = option
    told = "request-timeout" if name == "request_seconds" else name.replace("_", "-")
    with pytest.raises(UserError, match=told.removesuffix("s")):
        ServeConfig(**option)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# people\n{KEY}\n\n  {KEY[::-1]}x \n")
    assert read_keys(path) == (KEY, KEY[::-1] + "x")
    path.write_text("# nobody\n")
    with pytest.raises(UserError, match="contains no key"):
        read_keys(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="ASCII"):
        read_keys(path)
    with pytest.raises(UserError, match="No such file"):
        read_keys(tmp_path / "missing")


@pytest.mark.parametrize(
    ("mode", "exposed"), [(0o600, False), (0o640, True), (0o606, True), (0o602, True)]
)
def test_key_files_that_others_can_read_or_write(mode: int, exposed: bool, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(KEY)
    path.chmod(mode)
    assert is_exposed(path) == exposed
