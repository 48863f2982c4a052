"""ServeConfig: validated options of one server.

Holds addresses, API keys, timeouts and the limits an operator may change. Limits of single request
fields are in `protocol.limits`, sampling ranges in `engine.params`.
"""

import ipaddress
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

from lowlat.serve.protocol import limits
from lowlat.utils.bounded_read import read_bounded
from lowlat.utils.errors import UserError

MIN_KEY_LENGTH = 16
MAX_KEY_LENGTH = 512
MAX_KEYS = 1024
MAX_KEYS_BYTES = 2**20
_KEY = re.compile(rf"[!-~]{{{MIN_KEY_LENGTH},{MAX_KEY_LENGTH}}}")
_ORIGIN = re.compile(
    r"https?://(?:[a-z0-9](?:[a-z0-9.-]{0,252}[a-z0-9])?|\[[0-9a-f:.]{2,45}\])(?::[0-9]{1,5})?"
)
_HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """Options of a server. Raises UserError naming the option and its range."""

    host: str = "127.0.0.1"
    """Address to listen on; any but a loopback address requires api_keys."""
    port: int = 8000
    """Port to listen on; 0 picks a free one."""
    model_name: str | None = None
    """Model name that clients request; None: the name the model was loaded by."""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """API keys; empty: no authentication, which only a loopback address allows."""
    model_aliases: tuple[str, ...] = ()
    """Further names of a single model."""
    memory_bytes: int | None = None
    """Limit of the weights and KV caches of models that are loaded on demand; None: no limit."""
    load_seconds: int | float = 120.0
    """Time that a request waits for its model to load; then 503."""
    unload_seconds: int | float | None = None
    """An idle model that was loaded on demand is unloaded after this time; None: when another
    needs its memory."""
    allowed_hosts: tuple[str, ...] = ()
    """Accepted Host names in addition to loopback names and `host`."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of other pages that may call the API (CORS), such as `https://example.org`."""
    max_body_bytes: int = limits.MAX_BODY_BYTES
    """Largest request body; more gets 413."""
    max_connections: int = 2048
    """Open connections. For one more the longest idle one is closed, else it gets 503."""
    max_slow_bodies: int = 256
    """Bodies that take more than a second to arrive, a quarter of them per API key and address; the
    slowest get 408."""
    max_requests: int = 1024
    """Concurrent HTTP requests with a body; more get 429. No rate limit applies."""
    workers: int = 2
    """Threads for JSON, chat templates and tokenization."""
    max_waiting_work: int = 256
    """Tasks that may wait for a worker thread; more get 429."""
    max_waiting_grammars: int = 32
    """Grammars that may wait to be compiled, half of them per API key; more get 429."""
    max_grammar_bytes: int = 2**30
    """Memory for grammars of active requests, half of it per API key; more get 429."""
    max_response_bytes: int = 256 * 2**20
    """Memory for stored responses; the least recently used give way."""
    header_seconds: int | float = 10.0
    """Time to receive a request's line and headers."""
    body_seconds: int | float = 30.0
    """Time to receive a request's body; then 408."""
    send_seconds: int | float = 60.0
    """A client that reads none of its response for this long is disconnected."""
    ping_seconds: int | float = 15.0
    """Interval of SSE comments in a silent stream, so that proxies keep it open."""
    keep_alive_seconds: int = 30
    """An idle connection is closed after this time."""
    request_seconds: int | float | None = None
    """Default and maximum of deadline_seconds."""
    drain_seconds: int | float = 30.0
    """Time for running requests to finish after SIGTERM."""

    def __post_init__(self) -> None:
        _check_range("port", self.port, 0, 65535)
        _check_range("max_body_bytes", self.max_body_bytes, 1024, 2**30)
        _check_range("max_connections", self.max_connections, 1, 100_000)
        _check_range("max_slow_bodies", self.max_slow_bodies, 1, 100_000)
        _check_range("max_requests", self.max_requests, 1, 100_000)
        _check_range("workers", self.workers, 1, 64)
        _check_range("max_waiting_work", self.max_waiting_work, 1, 100_000)
        _check_range("max_waiting_grammars", self.max_waiting_grammars, 1, 100_000)
        _check_range("max_grammar_bytes", self.max_grammar_bytes, 2**20, 2**40)
        _check_range("max_response_bytes", self.max_response_bytes, 2**20, 2**40)
        _check_range("keep_alive_seconds", self.keep_alive_seconds, 1, 3600)
        for name in ("header_seconds", "body_seconds", "send_seconds", "ping_seconds"):
            _check_range(name, getattr(self, name), 0.01, 3600.0)
        _check_range("drain_seconds", self.drain_seconds, 0.0, 24 * 3600.0)
        _check_range("load_timeout", self.load_seconds, 0.01, 24 * 3600.0)
        if self.unload_seconds is not None:
            _check_range("unload_after", self.unload_seconds, 0.01, 365 * 24 * 3600.0)
        if self.request_seconds is not None:
            _check_range("request_timeout", self.request_seconds, 0.01, limits.MAX_DEADLINE_SECONDS)
        self._check_hosts()
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise UserError(
                    "allowed-origin must be like https://example.org or http://localhost:3000,"
                    f" in lower case and without a path, got {origin!r}"
                )
        self._check_keys()

    def _check_hosts(self) -> None:
        for option, name in [
            ("host", self.host),
            *(("allowed-host", h) for h in self.allowed_hosts),
        ]:
            if not is_address(name) and not _HOST_NAME.fullmatch(name):
                raise UserError(f"{option} must be a host name or an address, got {name!r}")

    def _check_keys(self) -> None:
        if not self.api_keys and not is_loopback(self.host):
            raise UserError(
                f"host {self.host} is reachable from other machines; set --api-key-file, or "
                "listen on 127.0.0.1"
            )
        if len(self.api_keys) > MAX_KEYS:
            raise UserError(f"at most {MAX_KEYS} API keys are allowed, got {len(self.api_keys)}")
        for number, key in enumerate(self.api_keys, 1):
            if not _KEY.fullmatch(key):
                raise UserError(
                    f"API key {number} must have {MIN_KEY_LENGTH} to {MAX_KEY_LENGTH} printable "
                    "ASCII characters without spaces; create one with: openssl rand -hex 32"
                )

    @property
    def is_wildcard(self) -> bool:
        """Whether the server listens on every address of the machine."""
        return is_address(self.host) and ipaddress.ip_address(self.host).is_unspecified


def read_keys(path: Path) -> tuple[str, ...]:
    """The API keys in a file, one per line; empty lines and lines that start with # are skipped.

    Raises UserError if the file cannot be read or contains no key.
    """
    try:
        data = read_bounded(path, MAX_KEYS_BYTES, f"--api-key-file '{path}'")
        lines = data.decode("ascii").splitlines()
    except OSError as error:
        raise UserError(f"--api-key-file '{path}': {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--api-key-file '{path}': keys must be ASCII text") from error
    stripped = [line.strip() for line in lines]
    keys = tuple(line for line in stripped if line and not line.startswith("#"))
    if not keys:
        raise UserError(f"--api-key-file '{path}' contains no key; write one key per line")
    return keys


def is_exposed(path: Path) -> bool:
    """Whether the file's group or other users may read or write it."""
    return sys.platform != "win32" and bool(path.stat().st_mode & 0o066)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`, by name or address."""
    if is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return host.lower().rstrip(".") == "localhost"


def is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_range(name: str, value: int | float, low: int | float, high: int | float) -> None:
    # NaN fails every comparison and is rejected.
    if isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name.replace('_', '-')} must be from {low:g} to {high:g}, got {value!r}")
