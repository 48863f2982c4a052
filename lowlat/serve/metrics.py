"""GET /metrics: engine and HTTP metrics in Prometheus' text format.

Metric names follow vLLM, with the prefix `lowlat:`. `engine.stats` collects the values.
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

from lowlat.engine.stats import DROP_REASONS, DiskCacheStats, EngineStats, Histogram
from lowlat.serve.state import ServerState

PREFIX = "lowlat:"
UNKNOWN_ROUTE = "none"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FINISHED = ("stop", "length", "abort", "error", "deadline")


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, state: ServerState) -> None:
        self._names: dict[object, str] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(state))
        self._requests = Counter(
            f"{PREFIX}http_requests",
            "HTTP requests by route, method and status (499: client disconnected).",
            ("route", "method", "status"),
            registry=self._registry,
        )
        self._seconds = HttpHistogram(
            f"{PREFIX}http_request_duration_seconds",
            "Seconds from a request's headers to the end of its response.",
            ("route",),
            buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
            registry=self._registry,
        )

    def set_routes(self, routes: Iterable[Route]) -> None:
        """Set the known routes; requests for other paths count as UNKNOWN_ROUTE."""
        self._names = {route.endpoint: route.path for route in routes}

    def count(self, scope: Scope, status: int, seconds: int | float) -> None:
        # Clients choose paths and methods; only known ones become label values.
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
    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        stats = self._state.engine.stats
        for name, text, value in _gauges(stats):
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        for name, text, value in _counters(stats):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        finished = CounterMetricFamily(
            f"{PREFIX}request_success",
            "Finished completions by reason.",
            labels=["finished_reason"],
        )
        for reason in _FINISHED:
            finished.add_metric([reason], stats.finished.get(reason, 0))
        yield finished
        yield from _disk_counters(stats.disk)
        for name, text, histogram in _histograms(stats):
            yield _family(PREFIX + name, text, histogram)


def _gauges(stats: EngineStats) -> Iterator[tuple[str, str, float]]:
    yield "num_requests_running", "Sequences in the running batch.", stats.running
    yield "num_requests_waiting", "Requests waiting for their first step.", stats.queued
    used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    yield "kv_cache_usage_perc", "Fraction of KV cache pages in use, 0 to 1.", used
    yield "kv_cache_pages", "KV cache pages in total.", stats.pages_total
    yield "kv_cache_pages_cached", "Pages only the prefix cache holds.", stats.pages_cached


def _counters(stats: EngineStats) -> Iterator[tuple[str, str, float]]:
    yield "prompt_tokens", "Prompt tokens of started requests.", stats.prompt_tokens
    yield "generation_tokens", "Generated tokens.", stats.generated_tokens
    yield "prefix_cache_queries", "Prompt tokens looked up in the cache.", stats.prompt_tokens
    yield "prefix_cache_hits", "Prompt tokens found in the cache.", stats.cached_prompt_tokens
    yield "spec_decode_num_draft_tokens", "Draft tokens proposed.", stats.drafted_tokens
    yield "spec_decode_num_accepted_tokens", "Draft tokens accepted.", stats.accepted_tokens
    yield "num_preemptions", "Sequences preempted and recomputed.", stats.preemptions
    yield "engine_steps", "Engine steps.", stats.steps


def _disk_counters(stats: DiskCacheStats) -> Iterator[Metric]:
    for name, text, value in [
        ("hits", "Prompt tokens read from disk.", stats.hit_tokens),
        ("read_bytes", "Bytes read from disk.", stats.read_bytes),
        ("written_bytes", "Bytes written to disk.", stats.written_bytes),
        ("evicted_bytes", "Bytes evicted from disk (LRU).", stats.evicted_bytes),
    ]:
        yield CounterMetricFamily(f"{PREFIX}prefix_cache_disk_{name}", text, value=value)
    dropped = CounterMetricFamily(
        f"{PREFIX}prefix_cache_disk_dropped",
        "Pages not used or not written, by reason.",
        labels=["reason"],
    )
    for reason in DROP_REASONS:
        dropped.add_metric([reason], stats.dropped.get(reason, 0))
    yield dropped


def _histograms(stats: EngineStats) -> Iterator[tuple[str, str, Histogram]]:
    yield "time_to_first_token_seconds", "Arrival to first token.", stats.ttft
    yield "inter_token_latency_seconds", "Time between tokens of a sequence.", stats.itl
    yield "e2e_request_latency_seconds", "Arrival to end of a completion.", stats.e2e
    yield "request_queue_time_seconds", "Arrival to first step.", stats.queue_time


def _family(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    total = 0
    buckets: list[tuple[str, float]] = []
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum)
