"""Who has had how much: service counted per client, so that none is served at another's expense.

Owns the counters, in tokens read or generated. The rule is that of virtual token counters (Sheng
et al., "Fairness in Serving Large Language Models", OSDI 2024): the client with the least service
goes first, and a client that comes back after a pause starts level with those that are there,
because unused service cannot be saved up.
"""


class Fairness:
    """Service by client. A client is one API key, so they are few enough to be remembered."""

    def __init__(self) -> None:
        self._service: dict[bytes, int] = {}
        self._num_active: dict[bytes, int] = {}

    def enter(self, client: bytes) -> None:
        """A sequence of `client` has come."""
        if client not in self._num_active:
            level = min((self._service[active] for active in self._num_active), default=0)
            self._service[client] = max(self._service.get(client, 0), level)
            self._num_active[client] = 0
        self._num_active[client] += 1

    def leave(self, client: bytes) -> None:
        """A sequence of `client` has ended."""
        self._num_active[client] -= 1
        if self._num_active[client] == 0:
            del self._num_active[client]

    def serve(self, client: bytes, num_tokens: int) -> None:
        """Tokens of `client` were read or generated."""
        self._service[client] += num_tokens

    def service(self, client: bytes) -> int:
        """Tokens that count as the client's."""
        return self._service[client]
