"""The search over layouts, and what it says about those that lose."""

from dataclasses import replace

import pytest

from lowlat.config.presets import load_preset
from lowlat.plan.estimate import estimate
from lowlat.plan.job import ParallelLayout
from lowlat.plan.machine import H800
from lowlat.plan.published import DEEPSEEK_V3
from lowlat.plan.search import all_layouts, neighbours, search
from lowlat.utils.errors import UserError

V3 = load_preset("deepseek-v3")
JOB = DEEPSEEK_V3.job


@pytest.mark.slow
def test_the_papers_layout_is_the_best_around_it():
    """PP16 and EP64 with the schedules the paper compares; ties go to the quieter network."""
    layouts = [
        replace(
            JOB.layout, fsdp=2048 // pipeline, pipeline=pipeline, expert=expert, schedule=schedule
        )
        for pipeline in (8, 16)
        for expert in (32, 64, 128)
        for schedule in ("1f1b", "zb1p", "dualpipe")
    ]
    eight = replace(JOB.layout, fsdp=256, pipeline=8)
    found = search(V3, JOB, H800, layouts)
    best = found.ranked[0]
    assert best.job.layout == JOB.layout
    assert best.job.activation_checkpointing == "selective"
    assert best.time.total <= 1.01 * min(each.time.total for each in found.ranked)
    assert all(each.fits for each in found.ranked)
    assert found.tried == 18
    # Where the paper's choice of what to compute again does not fit, another one has to.
    short = next(each for each in found.ranked if replace(each.job.layout, zero=1) == eight)
    assert (short.job.layout.zero, short.job.activation_checkpointing) != (1, "selective")


@pytest.mark.parametrize(("devices", "near"), [(7, 8), (300, 256)])
def test_devices_that_divide_nothing_are_reported(devices: int, near: int):
    """Regression: a lack of memory named where rows do not come out even."""
    layouts = all_layouts(V3, devices, H800)
    said = f"{devices} devices do not divide 4096 rows per step.*; give {near} instead"
    with pytest.raises(UserError, match=said):
        search(V3, replace(JOB, batch_size=4096), H800, layouts)


def test_layouts_are_every_division_by_powers_of_two():
    layouts = all_layouts(load_preset("smollm2-135m"), 4, H800)
    assert {(each.pipeline, each.tensor, each.fsdp) for each in layouts} == {
        (1, 1, 4), (1, 2, 2), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)
    }  # fmt: skip
    assert all(each.devices == 4 and each.expert == 1 for each in layouts)
    assert len(set(layouts)) == len(layouts) == 3 + 3 * 5
    experts = all_layouts(V3, 2048, H800)
    assert JOB.layout in experts
    assert max(each.expert for each in experts) == 256


def test_too_small_a_cluster_is_reported():
    with pytest.raises(UserError, match="no layout of this model fits devices of 80 GB; give more"):
        search(V3, JOB, H800, [ParallelLayout(fsdp=8, expert=8), ParallelLayout(fsdp=7, expert=2)])


def test_single_changes_are_explained():
    base = estimate(V3, JOB, H800)
    around = {each.change: each for each in neighbours(V3, base)}
    assert around["dualpipe"].why == "this layout"
    assert "mostly traffic" in around["1f1b"].why
    assert around["pipeline 8"].why.startswith("does not fit: ")
    assert around["expert 128"].why.startswith("as fast; +134 GB")
    assert around["activation checkpointing none"].why.endswith("mostly activations")


def test_impossible_changes_say_why():
    job = replace(JOB, batch_size=128 * 33)
    around = {each.change: each for each in neighbours(V3, estimate(V3, job, H800))}
    assert around["pipeline 8"].found is None
    assert "must be a multiple of" in around["pipeline 8"].why
