"""ResponseStore: responses of the Responses API in bounded memory, LRU, apart for each API key.

A server without keys has one namespace. Nothing is written to disk.
"""

from collections import OrderedDict
from dataclasses import dataclass

ENTRY_BYTES = 512
"""Counted for each response in addition to its data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredResponse:
    """A response as JSON texts, so that its size is known."""

    items: bytes
    """The conversation before the output: a list of input items."""
    response: bytes
    """The response object, which contains the output."""

    @property
    def num_bytes(self) -> int:
        return len(self.items) + len(self.response) + ENTRY_BYTES


class ResponseStore:
    """Used by the event loop only. Over `max_bytes`, the API key that holds most loses its least
    recently used responses, so that no key can evict those of others.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._by_namespace: dict[bytes, OrderedDict[str, StoredResponse]] = {}
        self._sizes: dict[bytes, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def put(self, namespace: bytes, id: str, stored: StoredResponse) -> None:
        if stored.num_bytes > self._max_bytes:
            return
        self._by_namespace.setdefault(namespace, OrderedDict())[id] = stored
        self._sizes[namespace] = self._sizes.get(namespace, 0) + stored.num_bytes
        while self.num_bytes > self._max_bytes:
            largest = max(self._sizes, key=lambda name: self._sizes[name])
            self.delete(largest, next(iter(self._by_namespace[largest])))

    def get(self, namespace: bytes, id: str) -> StoredResponse | None:
        """The response, which becomes the most recently used; None if it is not stored."""
        held = self._by_namespace.get(namespace, OrderedDict())
        if id in held:
            held.move_to_end(id)
        return held.get(id)

    def delete(self, namespace: bytes, id: str) -> bool:
        """Whether the response was stored."""
        stored = self._by_namespace.get(namespace, OrderedDict()).pop(id, None)
        if stored is None:
            return False
        self._sizes[namespace] -= stored.num_bytes
        if not self._by_namespace[namespace]:
            del self._by_namespace[namespace], self._sizes[namespace]
        return True
