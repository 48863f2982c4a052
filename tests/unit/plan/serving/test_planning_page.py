"""docs/planning-serving.md: every figure of a plan in its tables is that of today."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lowlat.config.presets import load_preset
from lowlat.config.serving_layout import ServingLayout
from lowlat.plan.serving.estimate import ServingEstimate, ServingJob, estimate
from lowlat.plan.serving.machines import MACHINES, Cluster, ServingMachine, parse_cluster
from lowlat.plan.serving.search import all_layouts, rank_layouts
from lowlat.plan.serving.weights import dtype_weights, gguf_weights

PAGE = (Path(__file__).parents[4] / "docs" / "planning-serving.md").read_text(encoding="utf-8")
V3 = load_preset("deepseek-v3")


def table(header: str) -> list[list[str]]:
    """The cells of the table of the page whose header starts with `header`."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def numbers(text: str) -> list[float]:
    return [float(each.replace(",", "")) for each in re.findall(r"[0-9][0-9.,]*[0-9]|[0-9]", text)]


def rounded(value: float, text: str) -> str:
    """`value` with as many decimals as the page's figure `text`."""
    return f"{value:,.{len(text.partition('.')[2])}f}"


def test_layouts_of_four_servers():
    cluster = parse_cluster("4xepyc-9654")
    weights = dtype_weights(V3, "fp8")
    job = ServingJob(weights=weights, dtype="fp8", users=16, context=8192, prompt=8192)
    ranked = rank_layouts(V3, job, cluster, all_layouts(V3, cluster)).fitting
    by_name = {str(each.layout): each for each in ranked}
    rows = table("| layout | copies |")
    names = ["pipeline=1" if name == "one process per socket" else name for name, *_ in rows]
    assert names == [str(each.layout) for each in ranked if str(each.layout) in names]
    for name, (_, *cells) in zip(names, rows, strict=True):
        found = by_name[name]
        values = (
            found.replicas,
            found.total_bytes / 1e9,
            found.tokens_per_second,
            found.per_user,
            found.first_token,
            found.sent_bytes / 1e6,
        )
        assert [rounded(value, cell) for value, cell in zip(values, cells, strict=True)] == cells


def single(
    preset: str, machine: ServingMachine, bits: float, context: int
) -> tuple[ServingEstimate, float]:
    """(the plan of one user, tokens per second of a prompt of 512)."""
    config = load_preset(preset)
    job = ServingJob(
        weights=gguf_weights(config, bits), dtype="bf16", users=1, context=context, prompt=512
    )
    found = estimate(config, job, Cluster(machine=machine), ServingLayout())
    return found, 512 / found.first_token


def test_plans_of_published_systems():
    """DeepSeek's report, ktransformers, and ik_llama.cpp's decode and prefill."""
    report, ktransformers, decode, prefill, xeon = (
        numbers(row[2]) for row in table("| system | published |")
    )
    job = ServingJob(
        weights=dtype_weights(V3, "fp8"),
        dtype="fp8",
        users=11264,
        context=4989,
        prompt=4989,
        is_data_parallel=True,
    )
    found = estimate(V3, job, parse_cluster("128xh800"), ServingLayout(expert=128))
    assert [found.tokens_per_second / 16, found.per_user] == pytest.approx(report, rel=0.005)
    epyc = MACHINES["epyc-9654"]
    rates = [single("deepseek-v3", epyc, 4.85, n)[0].per_user for n in (1000, 10_000)]
    assert rates == pytest.approx(ktransformers, rel=0.005)
    flops = {**MACHINES["epyc-9755"].flops, "bf16": 16.4e12}
    zen5 = replace(MACHINES["epyc-9755"], memory_bandwidth=232e9, flops=flops)
    plans = [single(name, zen5, 2.7, 128) for name in ("kimi-k2", "deepseek-v3.2")]
    assert [plan.per_user for plan, _ in plans] == pytest.approx(decode, rel=0.005)
    assert [rate for _, rate in plans] == pytest.approx(prefill, rel=0.005)
    rate = single("deepseek-v3", MACHINES["xeon-6980p"], 4.85, 512)[1]
    assert [rate] == pytest.approx(xeon, rel=0.005)
