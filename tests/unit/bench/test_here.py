"""This machine measured: the sample of a model's layers, and rates solved from times."""

from dataclasses import astuple, replace

import pytest

from lowlat.bench import here, sample_model
from lowlat.config.presets import load_preset
from lowlat.plan.serving.machines import MACHINES, ServingMachine
from lowlat.plan.serving.step_cost import KernelRates, Step, step_cost, step_seconds
from lowlat.plan.serving.weights import dtype_weights
from lowlat.utils.errors import UserError
from lowlat.utils.progress import SilentProgress
from tests.unit.bench.benchmarks import random_checkpoint

TINY = random_checkpoint().config_of("tiny")


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "llama-3.1-8b", "glm-5.2"])
@pytest.mark.parametrize("dtype", ["bf16", "int4"])
def test_samples_have_the_shapes_of_the_model(name: str, dtype: str):
    config = load_preset(name)
    sample = sample_model.sample_config(config, dtype)
    assert sample.hidden_size == config.hidden_size and not sample.is_sparse
    assert sample.num_attention_heads == config.num_attention_heads
    assert dtype_weights(sample, dtype).total(sample) < 4 * sample_model.SAMPLE_BYTES
    if config.moe is not None:
        kinds = {sample.is_moe_layer(layer) for layer in range(sample.num_hidden_layers)}
        assert kinds == {False, True}


def test_small_models_keep_their_experts():
    sample = sample_model.sample_config(TINY, "bf16")
    assert sample.moe is not None and TINY.moe is not None
    assert sample.moe.n_routed_experts == TINY.moe.n_routed_experts
    assert sample.num_hidden_layers == TINY.num_hidden_layers


def test_rates_that_explain_the_times_are_found():
    """Times of the step model at known rates give these rates back."""
    sample = sample_model.sample_config(load_preset("deepseek-v2-lite"), "bf16")
    weights, layer = dtype_weights(sample, "bf16"), 1e-4
    decode = KernelRates(bandwidth=5e10, products=2e12, scores=3e11, int8_scores=3e11)
    prefill = replace(decode, scores=6e11)

    def seconds(rates: KernelRates, **step: int) -> float:
        bound = step_seconds(step_cost(sample, Step(**step), weights), rates)
        own = bound.weights.seconds + bound.attention.arithmetic
        return own + layer * sample.num_hidden_layers

    times = here.SampleTimes(
        decode=seconds(decode, context=here.SHORT),
        long_decode=seconds(decode, context=here.LONG),
        chunk=1024,
        prefill=seconds(prefill, queries=1024),
        later_prefill=seconds(prefill, queries=1024, context=here.LONG - 1024),
        layer=layer,
    )
    machine = here.solve(sample, weights, "bf16", times)
    found = machine.rates("bf16", decodes=True)
    assert found.bandwidth == pytest.approx(5e10)
    assert found.products == pytest.approx(2e12)
    assert found.scores == pytest.approx(3e11)
    assert machine.rates("bf16", decodes=False).scores == pytest.approx(6e11)
    assert machine.layer_seconds == layer


@pytest.mark.parametrize(
    ("times", "what"),
    [
        ((1.0, 1.0, 4.0, 5.0, 1e-4), "attention of a decode step"),
        ((1.0, 1.5, 4.0, 3.9, 1e-4), "attention of prefill"),
        ((1.0, 1.5, 4.0, 5.0, 9.0), "memory bandwidth"),
        ((30.0, 30.5, 4.0, 5.0, 1.0), "products with weights"),
    ],
)
def test_times_that_no_rates_explain_are_refused(times: tuple[float, ...], what: str):
    sample = sample_model.sample_config(load_preset("deepseek-v2-lite"), "bf16")
    names = ("decode", "long_decode", "prefill", "later_prefill", "layer")
    taken = here.SampleTimes(**dict(zip(names, times, strict=True)))
    with pytest.raises(UserError, match=f"^--machine here: the machine is too busy.*{what}; stop"):
        here.solve(sample, dtype_weights(sample, "bf16"), "bf16", taken)


def test_more_steps_than_drawn_tokens(monkeypatch: pytest.MonkeyPatch):
    """Regression: a StopIteration where 4,096 steps of a small model took less than SECONDS."""
    monkeypatch.setattr(here, "SECONDS", 0.0)
    monkeypatch.setattr(here, "random_token_ids", lambda *_: [1])
    worker = sample_model.new_worker(sample_model.narrow_config(TINY), "bf16", "bf16")
    assert here._decode_seconds(worker, 8) > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "int8", "int4", "fp32"])
def test_any_dtype_is_measured(dtype: str, monkeypatch: pytest.MonkeyPatch):
    """The times; their differences may be lost in other load."""
    found: list[here.SampleTimes] = []

    def solve(*given: object) -> ServingMachine:
        times = given[-1]
        assert isinstance(times, here.SampleTimes)
        found.append(times)
        return MACHINES["h100"]

    monkeypatch.setattr(here, "SECONDS", 0.01)
    monkeypatch.setattr(here, "LONG", 2048)
    monkeypatch.setattr(here, "solve", solve)
    here.measure_here(TINY, dtype, "int8" if dtype == "int8" else "bf16", 512, SilentProgress())
    assert min(astuple(found[0])) > 0
