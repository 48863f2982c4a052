"""Pipeline stages of serving: every layer in one stage, balanced by parameters."""

from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import pytest

from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.config.presets import load_preset
from lowlat.config.serving_layout import ServingLayout
from lowlat.plan.serving import estimate
from lowlat.plan.serving.layout import check_layout
from lowlat.plan.serving.machines import parse_cluster
from lowlat.plan.serving.weights import dtype_weights
from lowlat.plan.serving_stages import requested_layout, serving_stages, share_of
from lowlat.utils.errors import UserError
from tests.configs import GQA, MLA, MOE, model_config
from tests.fakes import gqa_config
from tests.unit.checkpoint.builders import SPARSE_GLM

CONFIG = model_config("deepseek_v3", MLA, moe=MOE, num_hidden_layers=9, num_nextn_predict_layers=1)


@pytest.mark.parametrize("count", range(1, 10))
def test_stages_cover_all_layers(count: int) -> None:
    stages = serving_stages(CONFIG, count)
    assert [layer for stage in stages for layer in stage.layers] == [*range(9)]
    assert [stage.is_first for stage in stages] == [True] + [False] * (count - 1)
    assert [stage.is_last for stage in stages] == [False] * (count - 1) + [True]
    cached = [layer for stage in stages for layer in stage.cache_layers(CONFIG)]
    assert cached == [*range(10)]


def test_dense_layers_and_the_ends_count_by_their_parameters() -> None:
    """Layers with experts are larger than dense ones; the last stage also has the MTP module."""
    dense_first = replace(CONFIG, moe=replace(MOE, first_k_dense_replace=5, n_routed_experts=96))
    first, last = serving_stages(dense_first, 2)
    assert len(first.layers) > len(last.layers)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match=r"pipeline=10: .* at most 9 stages"):
        share_of(CONFIG, ServingLayout(pipeline=10), 0)


def test_layers_that_share_a_choice_stay_together() -> None:
    """A sparse layer without an indexer attends to the tokens that the layer before chose."""
    shared = replace(SPARSE_GLM, indexer=replace(SPARSE_GLM.indexer, is_shared=True))
    attention = (SPARSE_GLM, shared, shared, SPARSE_GLM, SPARSE_GLM, shared)
    config: ModelConfig = model_config("glm_moe_dsa", attention, num_hidden_layers=6)
    starts = {stage.layers.start for stage in serving_stages(config, 3)}
    assert starts == {0, 3, 4}


DENSE = model_config(
    "deepseek_v3",
    replace(MLA, num_attention_heads=6),
    num_hidden_layers=9,
    hidden_size=44,
    intermediate_size=36,
)


@pytest.mark.parametrize(
    ("config", "processes", "local", "is_native", "layout"),
    [
        (DENSE, 2, 2, True, "tensor=2"),
        (DENSE, 4, 2, True, "tensor=2,pipeline=2"),
        (DENSE, 2, 2, False, "pipeline=2"),
        (DENSE, 4, 4, True, "pipeline=4"),
        (CONFIG, 4, 4, False, "pipeline=1,expert=4"),
        (CONFIG, 5, 5, True, "pipeline=5"),
        (load_preset("deepseek-v3"), 2, 2, True, "tensor=2"),
        (replace(DENSE, quantization=QuantConfig()), 2, 2, True, "pipeline=2"),
    ],
)
def test_auto_divides_layers_within_a_machine(
    config: ModelConfig, processes: int, local: int, is_native: bool, layout: str
) -> None:
    sizes = requested_layout("auto", config, processes=processes, local=local, is_native=is_native)
    assert sizes == ServingLayout.parse(layout)
    check_layout(config, sizes)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (DENSE, "tensor=4", "tensor=4: must divide the 6 attention heads"),
        (
            replace(DENSE, intermediate_size=45),
            "tensor=2",
            "tensor=2: must divide the 45 rows of dense MLPs",
        ),
        (
            replace(DENSE, hidden_size=45),
            "tensor=2",
            "tensor=2: must divide the 45 channels of the residual stream",
        ),
        (
            gqa_config(attention=GQA, hidden_size=48, intermediate_size=33),
            "tensor=3",
            "tensor=3: must divide the 2 key-value heads",
        ),
        (CONFIG, "expert=5", "expert=5: must divide the 12 routed experts"),
    ],
)
def test_sizes_that_do_not_divide_are_named(config: ModelConfig, layout: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--parallel {message}"):
        check_layout(config, ServingLayout.parse(layout))


@pytest.mark.parametrize(("preset", "count", "most"), [("deepseek-v3", 2, 61), ("glm-5.2", 4, 21)])
def test_plans_are_of_the_stages_that_are_served(
    preset: str, count: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, layout = load_preset(preset), ServingLayout(pipeline=count)
    messages = Mock(side_effect=estimate.step_messages)
    monkeypatch.setattr(estimate, "step_messages", messages)
    job = estimate.ServingJob(
        weights=dtype_weights(config, "bf16"), dtype="bf16", users=1, context=8, prompt=8
    )
    estimate.estimate(config, job, parse_cluster("8xh100"), layout)
    planned = {call.kwargs["layers"] for call in messages.mock_calls}
    assert planned == {stage.layers for stage in serving_stages(config, count)}
    for check in (check_layout, partial(share_of, rank=0)):
        check(config, ServingLayout(pipeline=most))
        with pytest.raises(UserError, match=f"at most {most} stages"):
            check(config, ServingLayout(pipeline=most + 1))
