"""Whole estimates: what moves them, and DeepSeek-V3's own layout."""

from dataclasses import replace
from typing import Any

import pytest

from lowlat.config.presets import load_preset
from lowlat.plan.estimate import Estimate, estimate
from lowlat.plan.job import ParallelLayout, TrainingJob
from lowlat.plan.machine import H800
from lowlat.plan.published import DEEPSEEK_V3
from lowlat.utils.errors import UserError
from tests.fakes import mla_config

V3 = load_preset("deepseek-v3")
PAPER = DEEPSEEK_V3.job


def paper(**changes: Any) -> Estimate:
    """The paper's training with another layout."""
    layout = replace(PAPER.layout, **changes)
    return estimate(V3, replace(PAPER, layout=layout), H800)


def test_the_layout_of_deepseek_v3_fits_and_takes_about_what_it_took():
    found = paper()
    assert found.job.layout.devices == 2048
    assert found.job.micro_batches == 120
    assert found.fits
    # 180K H800 hours per trillion tokens; the estimate knows no stragglers and no failures.
    assert found.device_hours(1e12) == pytest.approx(128e3, rel=0.01)
    assert 0.6 < found.device_hours(1e12) / DEEPSEEK_V3.hours_per_trillion < 1
    # Tokens, seconds and rates hang together.
    assert found.tokens_per_second * found.time.total == pytest.approx(15360 * 4096)
    assert found.mfu == pytest.approx(
        found.training_flops * found.tokens_per_second / 2048 / 989.4e12
    )


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ({"pipeline": 8, "fsdp": 256}, False),
        ({"expert": 8}, False),
        ({"zero": 0}, False),
        ({"schedule": "1f1b"}, True),
        ({"expert": 128}, True),
    ],
)
def test_which_neighbours_fit(changes: dict[str, Any], fits: bool):
    assert paper(**changes).fits is fits


def test_neighbours_that_fit_are_slower():
    best = paper().time.total
    for changes in ({"schedule": "1f1b"}, {"schedule": "zb1p"}, {"zero": 2}, {"zero": 3}):
        assert paper(**changes).time.total > 1.1 * best, changes


def test_only_bidirectional_schedules_hide_the_experts_traffic():
    slow = replace(H800, network_bandwidth=H800.network_bandwidth / 1.2)
    job = replace(PAPER, layout=replace(PAPER.layout, schedule="1f1b"))
    assert estimate(V3, job, slow).time.traffic > 1.1 * estimate(V3, job, H800).time.traffic
    # The slower network is still hidden behind computation.
    assert estimate(V3, PAPER, slow).time.traffic == estimate(V3, PAPER, H800).time.traffic
    slower = replace(slow, network_bandwidth=H800.network_bandwidth / 4)
    assert estimate(V3, PAPER, slower).time.traffic > 5.0


def test_bubbles_shrink_with_micro_batches():
    few = estimate(V3, replace(PAPER, batch_size=128 * 40), H800)
    assert few.time.bubble == pytest.approx(paper().time.bubble)
    assert few.bubble_share > 2 * paper().bubble_share


def test_one_device_computes_and_updates_only():
    job = TrainingJob(sequence_length=32, batch_size=4, micro_batch_size=2, precision="fp32")
    found = estimate(mla_config(), job, H800)
    assert found.transfers == []
    assert found.time.traffic == found.time.bubble == found.time.synchronisation == 0
    assert found.time.total == found.time.compute + found.time.update > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 3}, "tensor 3: must divide the 128 attention heads"),
        ({"expert": 96}, "expert 96: must divide the 256 routed experts"),
        ({"fsdp": 32}, "expert 64: must divide data"),
        ({"fsdp": 7 * 64}, "batch size 15360: must be a multiple of"),
        ({"pipeline": 64}, "pipeline 64: 64 stages for 61 layers"),
        ({"fsdp": 1024}, "pipeline 16: dualpipe needs 32 micro-batches per step and gets 15"),
        ({"pipeline": 15}, "pipeline 15: dualpipe needs an even number"),
    ],
)
def test_impossible_layouts_say_why(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        paper(**changes)


def test_layouts_count_their_devices():
    layout = ParallelLayout(data=2, fsdp=3, tensor=5, context=7, pipeline=11)
    assert layout.devices == 2 * 3 * 5 * 7 * 11
    assert layout.replicas == 2 * 3 * 7
