"""Prefix index: which replicas have computed the prefix of a prompt, and which gets a new one."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from lowlat.replicas.prefix import Prefix

OVERLOAD = 4
"""Requests that a replica with the prefix may have more than the least loaded one."""
CAPACITY = 2**17
"""Pages that are remembered; the least recently used are forgotten."""


class PrefixIndex:
    """Which replicas have computed which pages of prompts.

    Several indexes, or one after a restart, agree on conversations that they do not know by
    rendezvous hashing: the replica with the largest hash of the conversation's opening and its own
    id gets them. If a replica ends, only its conversations move.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._holders: OrderedDict[bytes, set[str]] = OrderedDict()

    def rank(self, prefix: Prefix, loads: Mapping[str, int]) -> list[str]:
        """The replicas of `loads` (their running requests) in order of preference."""

        def weight(replica: str) -> bytes:
            return hashlib.sha256(prefix.home + replica.encode()).digest()

        by_load = sorted(loads, key=lambda replica: (loads[replica], weight(replica)))
        holders = self._longest(prefix.pages) & loads.keys()
        if holders:
            first = next(replica for replica in by_load if replica in holders)
        elif prefix.home:
            first = max(loads, key=weight)
        else:
            first = by_load[0]
        if loads[first] > loads[by_load[0]] + OVERLOAD:
            first = by_load[0]
        return [first, *(replica for replica in by_load if replica != first)]

    def add(self, prefix: Prefix, replica: str) -> None:
        """Record that `replica` computes the prompt."""
        for page in prefix.pages:
            self._holders.setdefault(page, set()).add(replica)
            self._holders.move_to_end(page)
        while len(self._holders) > self._capacity:
            self._holders.popitem(last=False)

    def keep(self, replicas: set[str]) -> None:
        """Forget all other replicas."""
        for page, holders in list(self._holders.items()):
            holders &= replicas
            if not holders:
                del self._holders[page]

    def _longest(self, pages: Sequence[bytes]) -> set[str]:
        """Replicas with the most pages, if that is half of them or more: a smaller part, such as a
        common system prompt, is soon computed by every replica."""
        for count in range(len(pages), max(0, (len(pages) - 1) // 2), -1):
            holders = self._holders.get(pages[count - 1])
            if holders:
                return holders
        return set()
