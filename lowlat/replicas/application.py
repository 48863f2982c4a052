"""The Ray Serve application that `serve run lowlat.replicas.application:build` starts."""

from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from lowlat.replicas.gateway import Gateway
from lowlat.replicas.options import GRACE_SECONDS, ReplicaOptions
from lowlat.replicas.replica import Replica

ROUTERS: dict[str, Any] = {
    "prefix": "lowlat.replicas.prefix_router.PrefixRouter",
    "round_robin": "ray.serve.experimental.round_robin_router.RoundRobinRouter",
    "power_of_two_choices": "ray.serve.request_router.PowerOfTwoChoicesRequestRouter",
}


def build(options: ReplicaOptions) -> serve.Application:
    """The application for Ray Serve. Raises UserError for options that `lowlat serve` refuses."""
    config = options.serve_config()
    router = RequestRouterConfig(request_router_class=ROUTERS[options.request_router])
    placement: dict[str, Any]
    if options.threads is None:
        placement = {"max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0}}
    else:
        placement = {"ray_actor_options": {"num_cpus": options.threads}}
    replica = serve.deployment(
        name="Replica",
        num_replicas=options.replicas,
        max_ongoing_requests=config.max_requests,
        request_router_config=router,
        **placement,
        graceful_shutdown_timeout_s=options.drain_seconds + GRACE_SECONDS,
    )(Replica)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=options.gateways,
        max_ongoing_requests=options.replicas * config.max_requests,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=options.drain_seconds + GRACE_SECONDS,
    )(Gateway)
    return gateway.bind(replica.bind(options), options)
