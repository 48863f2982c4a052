"""Throttle of failed logins per client address, against guessing of API keys on the login page."""

import ipaddress
import math
import time
from collections import deque
from collections.abc import Callable

MAX_FAILURES = 10
WINDOW_SECONDS = 60.0
MAX_ADDRESSES = 4096
"""Addresses that are remembered; beyond them the one that failed longest ago is forgotten."""


class LoginThrottle:
    """Allows MAX_FAILURES failed logins per address within WINDOW_SECONDS.

    An IPv6 client counts by its network of 64 bits, of which it can use every address.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # By address, in the order of the last failure.
        self._failures: dict[str, deque[float]] = {}

    def wait_seconds(self, address: str) -> int:
        """Seconds until the address may try again; 0: now."""
        times = self._failures.get(_network(address), deque())
        if len(times) < MAX_FAILURES:
            return 0
        return max(0, math.ceil(times[0] + WINDOW_SECONDS - self._clock()))

    def add_failure(self, address: str) -> None:
        """Count a login that failed."""
        network = _network(address)
        times = self._failures.pop(network, deque(maxlen=MAX_FAILURES))
        times.append(self._clock())
        self._failures[network] = times
        if len(self._failures) > MAX_ADDRESSES:
            del self._failures[next(iter(self._failures))]


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if parsed.version == 6 and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
