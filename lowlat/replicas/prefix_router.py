"""Prefix-aware request routing for Ray Serve: a request goes to the replica with the longest prefix
of its prompt in the KV cache, else to one chosen by rendezvous hashing, or to the least loaded.
"""

from collections import Counter
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from lowlat.replicas.messages import ReplicaRequest
from lowlat.replicas.prefix_index import PrefixIndex


class PrefixRouter(RequestRouter):
    """Ray Serve's request router for requests whose first argument is a ReplicaRequest."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Ray before the first request. Raises TypeError: it has no options."""
        if kwargs:
            raise TypeError(f"PrefixRouter has no options, got {sorted(kwargs)}")
        self._index = PrefixIndex()
        self._running: dict[str, str] = {}
        """Replicas of the requests that this router has sent, by internal request id."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._index.keep({each.replica_id.unique_id for each in replicas})

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One replica per rank: Ray takes the first that accepts the request."""
        if pending_request is None:
            return [candidate_replicas]
        # Without it Ray asks again at once while all replicas are full.
        pending_request.routing_context.should_backoff = True
        request = _request_of(pending_request)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # A replica that has refused the request is asked again only if all have.
        untried = [name for name in by_id if name not in request.tried] or list(by_id)
        counts = Counter(self._running.values())
        ranked = self._index.rank(request.prefix, {name: counts[name] for name in untried})
        return [[by_id[name]] for name in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        self._running[pending_request.metadata.internal_request_id] = replica_id.unique_id
        self._index.add(_request_of(pending_request).prefix, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        # A repeated request has the same id, and its first attempt may be reported later.
        if self._running.get(internal_request_id) == replica_id.unique_id:
            del self._running[internal_request_id]


def _request_of(pending: PendingRequest) -> ReplicaRequest:
    (request,) = pending.args
    assert isinstance(request, ReplicaRequest)
    return request
