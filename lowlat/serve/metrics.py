"""GET /metrics: the engine's figures and those of HTTP in Prometheus' text format.

Owns names and units, those usual in the field with the prefix `lowlat:`. The figures themselves are
`engine.stats`'s.
"""

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client import Histogram as HttpHistogram
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Scope

from lowlat.engine.stats import EngineStats, Histogram
from lowlat.serve.state import Services

PREFIX = "lowlat:"
UNKNOWN_ROUTE = "none"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FINISHED = ("stop", "length", "abort", "error", "deadline")


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, services: Services) -> None:
        self._names: dict[object, str] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(services))
        self._requests = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests by route, method and status (499: the client left).",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._seconds = HttpHistogram(
            f"{PREFIX}http_request_duration_seconds",
            "Seconds from a request's headers to the end of its answer.",
            ("route",),
            buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
            registry=self._registry,
        )

    def name_routes(self, routes: Iterable[Route]) -> None:
        """Learn which paths there are; requests for others count as one route."""
        self._names = {route.endpoint: route.path for route in routes}

    def count(self, scope: Scope, status: int, seconds: int | float) -> None:
        """Take in one finished request."""
        # Paths and methods are the client's words; only known ones become labels.
        route = self._names.get(scope.get("endpoint"), UNKNOWN_ROUTE)
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def route(self) -> Route:
        return Route("/metrics", self._answer)

    async def _answer(self, request: Request) -> Response:
        headers = {"Content-Type": CONTENT_TYPE_LATEST}
        return Response(generate_latest(self._registry), headers=headers)


class _EngineCollector(Collector):
    """Reads a snapshot of the engine whenever the metrics are asked for."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        stats = self._services.engine.stats
        for name, text, value in _gauges(stats):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in _counters(stats):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        finished = CounterMetricFamily(
            f"{PREFIX}request_success",
            "Completions that ended, by reason.",
            labels=["finished_reason"],
        )
        for reason in _FINISHED:
            finished.add_metric([reason], stats.finished.get(reason, 0))
        yield finished
        for name, text, histogram in _histograms(stats):
            yield _family(PREFIX + name, text, histogram)


def _gauges(stats: EngineStats) -> Iterator[tuple[str, str, float]]:
    yield "num_requests_running", "Sequences in the running batch.", stats.running
    yield "num_requests_waiting", "Sequences that wait for their first step.", stats.queued
    used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    yield "kv_cache_usage_perc", "Share of cache pages in use, 0 to 1.", used
    yield "kv_cache_pages", "Cache pages there are.", stats.pages_total
    yield "kv_cache_pages_cached", "Pages kept for the prefix cache alone.", stats.pages_cached


def _counters(stats: EngineStats) -> Iterator[tuple[str, str, float]]:
    yield "prompt_tokens", "Prompt tokens of started requests.", stats.prompt_tokens
    yield "generation_tokens", "Generated tokens.", stats.generated_tokens
    yield "prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prompt_tokens
    yield "prefix_cache_hits", "Prompt tokens found in it.", stats.cached_prompt_tokens
    yield "spec_decode_num_draft_tokens", "Drafted tokens.", stats.drafted_tokens
    yield "spec_decode_num_accepted_tokens", "Drafted tokens kept.", stats.accepted_tokens
    yield "num_preemptions", "Sequences set back for want of pages.", stats.preemptions
    yield "engine_steps", "Steps of the engine.", stats.steps


def _histograms(stats: EngineStats) -> Iterator[tuple[str, str, Histogram]]:
    yield "time_to_first_token_seconds", "From arrival to the first token.", stats.ttft
    yield "inter_token_latency_seconds", "From token to token of a sequence.", stats.itl
    yield "e2e_request_latency_seconds", "From arrival to a completion's end.", stats.e2e
    yield "request_queue_time_seconds", "From arrival to the first step.", stats.queue_time


def _family(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    total = 0
    buckets: list[tuple[str, float]] = []
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)
