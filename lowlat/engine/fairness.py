"""Fair scheduling by virtual token counters: no API key is served at another's expense.

Owns the counters of served tokens (prefilled or generated) per cache namespace. The rule is that of
Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): the client with the fewest
served tokens runs first. A client that returns after a pause starts level with the active ones,
because an unused share cannot be saved up.
"""


class FairShares:
    """Served tokens by client. A client is one API key's cache namespace, so there are few and none
    is dropped."""

    def __init__(self) -> None:
        self._served: dict[bytes, int] = {}
        self._num_active: dict[bytes, int] = {}

    def enter(self, client: bytes) -> None:
        """Count one more unfinished sequence of `client`."""
        if client not in self._num_active:
            level = min((self._served[active] for active in self._num_active), default=0)
            self._served[client] = max(self._served.get(client, 0), level)
            self._num_active[client] = 0
        self._num_active[client] += 1

    def leave(self, client: bytes) -> None:
        """Count one unfinished sequence of `client` fewer."""
        self._num_active[client] -= 1
        if self._num_active[client] == 0:
            del self._num_active[client]

    def serve(self, client: bytes, num_tokens: int) -> None:
        self._served[client] += num_tokens

    def served(self, client: bytes) -> int:
        return self._served[client]
