"""Connection limit: when it is reached, idle connections and slow uploads make way for new ones."""

from abc import ABC, abstractmethod

from lowlat.serve.http.incoming import IncomingBodies

CLOSING = 128
"""Connections above the limit while dropped ones still close."""


class Closable(ABC):
    """A connection."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The client's address, without its port."""

    @abstractmethod
    def close_idle(self) -> None:
        """Close the connection, on which no request is running."""


class ConnectionPool:
    """The open connections of a server, at most `most`; for one event loop."""

    def __init__(self, most: int, bodies: IncomingBodies) -> None:
        self._most = most
        self._bodies = bodies
        self._open: set[Closable] = set()
        # Idle connections by address, those that have been idle longest first.
        self._idle: dict[str, dict[Closable, None]] = {}

    def admit(self, connection: Closable) -> bool:
        """Count a new connection; False if it must be refused.

        At the limit the connection that has been idle longest is closed, of the address that has
        the most; without an idle one, the slowest body is dropped.
        """
        if len(self._open) >= self._most and not self._make_room():
            return False
        self._open.add(connection)
        self.mark_idle(connection)
        return True

    def mark_idle(self, connection: Closable) -> None:
        """No request is running on it."""
        if connection in self._open:
            self._idle.setdefault(connection.address, {})[connection] = None

    def mark_busy(self, connection: Closable) -> None:
        """A request has begun."""
        idle = self._idle.get(connection.address, {})
        idle.pop(connection, None)
        if not idle:
            self._idle.pop(connection.address, None)

    def remove(self, connection: Closable) -> None:
        """The connection has ended."""
        self._open.discard(connection)
        self.mark_busy(connection)

    def _make_room(self) -> bool:
        if self._idle:
            longest = next(iter(max(self._idle.values(), key=len)))
            self.remove(longest)
            longest.close_idle()
            return True
        return len(self._open) < self._most + CLOSING and self._bodies.drop_slowest()
