"""Cutting layers into stages, and counting the parameters of a device."""

from itertools import combinations

import pytest

from lowlat.config.parameter_count import attention_parameters, count_parameters
from lowlat.config.presets import load_preset
from lowlat.plan.job import ParallelLayout
from lowlat.plan.stages import ROUTED, PipelineStage, cut, device_parameters, held
from tests.fakes import gqa_config
from tests.lowlat_configs import LAYERS

V3 = load_preset("deepseek-v3")


def sizes(stages: list[PipelineStage]) -> list[int]:
    return [len(stage.layers) for stage in stages]


@pytest.mark.parametrize("pipeline", [1, 2, 3, 5])
def test_the_largest_stage_is_as_small_as_any_cut_makes_it(pipeline: int):
    costs = (3.0, 1.0, 4.0, 1.0, 5.0, 2.0, 6.0, 5.0)
    config = gqa_config(num_hidden_layers=7)
    stages = cut(config, ParallelLayout(pipeline=pipeline), costs)
    assert [layer for stage in stages for layer in stage.layers] == list(range(7))
    ends = [*[stage.layers[-1] + 1 for stage in stages[:-1]], 8]
    found = max(sum(costs[a:b]) for a, b in zip([0, *ends], ends, strict=False))
    every = [
        max(sum(costs[a:b]) for a, b in zip((0, *inner), (*inner, 8), strict=True))
        for inner in combinations(range(1, 8), pipeline - 1)
    ]
    assert found == min(every)


def test_dualpipe_balances_pairs_of_stages():
    """One device has the first and the last stage, so a heavy head makes the first stage light."""
    config = gqa_config(num_hidden_layers=14)
    costs = (1.0,) * 14 + (5.0,)
    stages = cut(config, ParallelLayout(pipeline=4, schedule="dualpipe"), costs)
    devices = held(stages, ParallelLayout(pipeline=4, schedule="dualpipe"))
    loads = [sum(len(s.layers) + 5 * s.is_last for s in device) / 2 for device in devices]
    assert max(loads) <= 5
    assert devices[0][0].is_first and devices[0][1].is_last


def test_a_limit_on_layers_holds():
    costs = (1.0,) * 61 + (4.9,)
    stages = cut(V3, ParallelLayout(pipeline=16, schedule="dualpipe"), costs, 4)
    assert max(sizes(stages)) == 4
    assert sum(sizes(stages)) == 61


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "dualpipev"])
def test_the_devices_of_a_pipeline_hold_the_model_once(schedule: str):
    layout = ParallelLayout(pipeline=4, schedule=schedule)  # pyright: ignore[reportArgumentType]
    devices = held(cut(V3, layout, (1.0,) * 62), layout)
    total = sum(sum(device_parameters(V3, stages, layout).values()) for stages in devices)
    count = count_parameters(V3)
    own = count.total + count.mtp
    # The MTP module needs the embedding too, unless its device has the first stage.
    copies = 0 if schedule == "dualpipev" else count.embedding
    assert total == own + copies


def test_layers_that_differ_are_held_where_they_lie():
    config = LAYERS["all"]
    layout = ParallelLayout(pipeline=2)
    first, second = (
        device_parameters(config, stages, layout)
        for stages in held(cut(config, layout, (1.0,) * 5), layout)
    )
    numbers = [attention_parameters(config, layer) for layer in range(5)]
    held_first = round(first["attention"])
    assert held_first in (sum(numbers[:2]), sum(numbers[:3]))
    assert held_first + second["attention"] == sum(numbers)


def test_dualpipe_holds_it_twice():
    layout = ParallelLayout(pipeline=4, schedule="dualpipe")
    devices = held(cut(V3, layout, (1.0,) * 62), layout)
    total = sum(sum(device_parameters(V3, stages, layout).values()) for stages in devices)
    count = count_parameters(V3)
    assert total == 2 * (count.total + count.mtp)


def test_experts_and_matrices_are_divided():
    stages = cut(V3, ParallelLayout(), (1.0,) * 62)
    whole = device_parameters(V3, stages, ParallelLayout())
    parts = device_parameters(V3, stages, ParallelLayout(fsdp=64, expert=64, tensor=4))
    assert parts[ROUTED] == whole[ROUTED] / 256
    assert parts["dense MLP"] == whole["dense MLP"] / 4
    assert parts["router"] == whole["router"]
    # The down-projections to the latents stay whole: 62 layers of 7168 x (1536 + 576) and norms.
    down = 62 * (7168 * (1536 + 576) + 1536 + 512)
    assert parts["attention"] == pytest.approx(down + (whole["attention"] - down) / 4)
