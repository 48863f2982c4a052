"""Prometheus metrics of several replicas as one page, with the replica as a label."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from starlette.responses import Response

REPLICA = "replica"


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in sorted(self._texts.items()):
            for family in text_string_to_metric_families(text):
                known = families.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, REPLICA: replica}
                    known.add_sample(sample.name, labels, sample.value)
        yield from families.values()


def merge_metrics(texts: Mapping[str, str]) -> Response:
    """The response to GET /metrics for the metrics of each replica by its name."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(texts))
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
