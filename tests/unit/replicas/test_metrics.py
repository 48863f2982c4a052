"""Metrics of several replicas on one page."""

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lowlat.replicas.metrics import merge_metrics


def page(count: int) -> str:
    registry = CollectorRegistry()
    Counter("lowlat:steps", "Steps.", ["model_name"], registry=registry).labels("m").inc(count)
    Histogram("lowlat:seconds", "Time.", buckets=(1.0,), registry=registry).observe(count)
    return generate_latest(registry).decode()


def test_samples_of_all_replicas_are_there_with_their_label() -> None:
    response = merge_metrics({"one": page(2), "two": page(5)})
    assert response.headers["content-type"].startswith("text/plain")
    families = {each.name: each for each in text_string_to_metric_families(response.body.decode())}
    steps = families["lowlat:steps"]
    assert (steps.type, steps.documentation) == ("counter", "Steps.")
    totals = {s.labels["replica"]: s.value for s in steps.samples if s.name.endswith("_total")}
    assert totals == {"one": 2.0, "two": 5.0}
    assert all(sample.labels["model_name"] == "m" for sample in steps.samples)
    buckets = [s for s in families["lowlat:seconds"].samples if s.name.endswith("_bucket")]
    assert {(s.labels["replica"], s.labels["le"], s.value) for s in buckets} == {
        *(("one", "1.0", 0.0), ("one", "+Inf", 1.0)),
        *(("two", "1.0", 0.0), ("two", "+Inf", 1.0)),
    }
