"""GET /metrics: engine and HTTP metrics in Prometheus' text format.

Metric names follow vLLM, with the prefix `lowlat:`. `engine.stats` collects the engine's values.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

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

from lowlat.engine.stats import (
    DROP_REASONS,
    DiskCacheStats,
    EngineStats,
    Histogram,
    KVTransferStats,
)
from lowlat.serve.served_model import STATES, ServedModel
from lowlat.serve.state import ServerState

PREFIX = "lowlat:"
MODEL = "model_name"
"""Label of everything about a model, as in vLLM."""
UNKNOWN_ROUTE = "none"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FINISHED = ("stop", "length", "abort", "error", "deadline")


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, state: ServerState) -> None:
        self._names: dict[object, str] = {}
        self._registry = CollectorRegistry()
        self._registry.register(_ModelCollector(state))
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


class _ModelCollector(Collector):
    """Metrics of every model, labelled with its name."""

    def __init__(self, state: ServerState) -> None:
        self._models = state.models.models

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for model in self._models:
            for family, labels, value in (*_engine_samples(model.stats), *_model_samples(model)):
                known = families.setdefault(family.name, family)
                _add(known, [model.name, *labels], value)
        yield from families.values()


Sample = tuple[Metric, list[str], int | float | Histogram]
"""A metric family without samples; the labels of a sample but the model's name; its value."""


def _engine_samples(stats: EngineStats) -> Iterator[Sample]:
    for name, text, value in _gauges(stats):
        yield GaugeMetricFamily(PREFIX + name, text, labels=[MODEL]), [], value
    for name, text, value in _counters(stats):
        yield CounterMetricFamily(PREFIX + name, text, labels=[MODEL]), [], value
    finished = f"{PREFIX}request_success", "Finished completions by reason."
    for reason in _FINISHED:
        family = CounterMetricFamily(*finished, labels=[MODEL, "finished_reason"])
        yield family, [reason], stats.finished.get(reason, 0)
    for name, text, value in _disk_counters(stats.disk):
        family = CounterMetricFamily(f"{PREFIX}prefix_cache_disk_{name}", text, labels=[MODEL])
        yield family, [], value
    dropped = f"{PREFIX}prefix_cache_disk_dropped", "Pages not used or not written, by reason."
    for reason in DROP_REASONS:
        family = CounterMetricFamily(*dropped, labels=[MODEL, "reason"])
        yield family, [reason], stats.disk.dropped.get(reason, 0)
    for name, text, value in _transfer_counters(stats.transfer):
        family = CounterMetricFamily(f"{PREFIX}kv_transfer_{name}", text, labels=[MODEL])
        yield family, [], value
    loads = f"{PREFIX}expert_tokens", "Tokens of a routed expert of a layer."
    for layer, counts in stats.expert_loads.items():
        family = CounterMetricFamily(*loads, labels=[MODEL, "layer", "expert"])
        for expert, count in enumerate(counts):
            yield family, [str(layer), str(expert)], count
    for name, text, histogram in _histograms(stats):
        yield HistogramMetricFamily(PREFIX + name, text, labels=[MODEL]), [], histogram


def _model_samples(model: ServedModel) -> Iterator[Sample]:
    is_loading, state = model.is_loading, model.state
    progress = model.progress.fraction if is_loading else float(state == "ready")
    waiting = model.num_requests if is_loading else 0
    for name, text, value in (
        ("model_load_progress", "Fraction of the model's loading that is done, 0 to 1.", progress),
        ("model_memory_bytes", "Memory of weights and KV cache, also reserved.", model.num_bytes),
        ("num_requests_loading", "Requests waiting for the model to load.", waiting),
    ):
        yield GaugeMetricFamily(PREFIX + name, text, labels=[MODEL]), [], value
    state_family = f"{PREFIX}model_state", "1 for the model's state."
    for each in STATES:
        family = GaugeMetricFamily(*state_family, labels=[MODEL, "state"])
        yield family, [each], float(each == state)
    for name, text, value in (
        ("model_loads", "Times the model was loaded on demand.", model.num_loads),
        ("model_unloads", "Times it was unloaded.", model.num_unloads),
        ("model_load_failures", "Times loading failed.", model.num_load_failures),
        ("model_crashes", "Times its engine ended by an error.", model.num_crashes),
    ):
        yield CounterMetricFamily(PREFIX + name, text, labels=[MODEL]), [], value


def _add(family: Metric, labels: list[str], value: int | float | Histogram) -> None:
    if isinstance(value, Histogram):
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric(labels, _buckets(value), value.sum)
    else:
        assert isinstance(family, GaugeMetricFamily | CounterMetricFamily)
        family.add_metric(labels, value)


def _gauges(stats: EngineStats) -> Iterator[tuple[str, str, float]]:
    yield "num_requests_running", "Sequences in the batch or in remote prefill.", stats.running
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


def _disk_counters(stats: DiskCacheStats) -> Iterator[tuple[str, str, float]]:
    yield "hits", "Prompt tokens read from disk.", stats.hit_tokens
    yield "read_bytes", "Bytes read from disk.", stats.read_bytes
    yield "written_bytes", "Bytes written to disk.", stats.written_bytes
    yield "evicted_bytes", "Bytes evicted from disk (LRU).", stats.evicted_bytes


def _transfer_counters(stats: KVTransferStats) -> Iterator[tuple[str, str, float]]:
    yield "tokens", "Prompt tokens whose pages came from prefill processes.", stats.tokens
    yield "bytes", "Bytes of these pages.", stats.bytes
    yield "damaged", "Pages that arrived damaged and were computed again.", stats.damaged


def _histograms(stats: EngineStats) -> Iterator[tuple[str, str, Histogram]]:
    yield "time_to_first_token_seconds", "Arrival to first token.", stats.ttft
    yield "inter_token_latency_seconds", "Time between tokens of a sequence.", stats.itl
    yield "e2e_request_latency_seconds", "Arrival to end of a completion.", stats.e2e
    yield "request_queue_time_seconds", "Arrival to first step.", stats.queue_time


def _buckets(histogram: Histogram) -> list[tuple[str, float]]:
    """Upper bounds and cumulative counts."""
    bounds = [*(str(bound) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(histogram.counts)), strict=True))
