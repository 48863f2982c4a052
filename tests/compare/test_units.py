"""The arithmetic of a comparison: measures by hand, rules against those of lowlat."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowlat.compare.diagnosis.diagnose import config_differences
from lowlat.compare.diagnosis.gate_reference import gate_scores, ranking, selected_weights
from lowlat.compare.diagnosis.rope_reference import correct_variant, cos_sin_scale, rotate
from lowlat.compare.differences import DifferenceSums, TraceDifferences
from lowlat.compare.implementations.spec import parse
from lowlat.compare.inputs import random_ids
from lowlat.compare.trace import (
    LAYER_PARTS,
    OUTPUT,
    Block,
    Place,
    Trace,
    load_trace,
    save_trace,
)
from lowlat.config.attention import short_name
from lowlat.config.model import RopeConfig
from lowlat.ops.rope import RotaryEmbedding, apply_rope
from lowlat.ops.routing import route
from lowlat.utils.errors import UserError
from tests.configs import MOE, YARN
from tests.lowlat_configs import EVERY, MLA, lowlat_config

LAYER = Block("layer", 3)


def test_difference_by_hand() -> None:
    sums = DifferenceSums()
    sums.add(torch.tensor([3.0, 0.0]), torch.tensor([3.0, 1.0]))
    sums.add(torch.tensor([0.0, 4.0]), torch.tensor([0.0, 2.0]))
    found = sums.difference()
    assert found.max_abs == 2.0
    assert found.relative == pytest.approx(math.sqrt(1 + 4) / 5)
    assert found.cosine == pytest.approx((9 + 8) / (5 * math.sqrt(9 + 1 + 4)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_a_difference(bad: float) -> None:
    sums = DifferenceSums()
    sums.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, bad]))
    assert sums.difference().relative == math.inf


def test_zeros_on_both_sides_are_equal() -> None:
    sums = DifferenceSums()
    sums.add(torch.zeros(3), torch.zeros(3))
    assert sums.difference().relative == 0.0 and sums.difference().cosine == 1.0


def test_kl_and_changed_experts_by_hand() -> None:
    a, b = Trace(dtype=torch.float32), Trace(dtype=torch.float32)
    a.record(OUTPUT, "logits", torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    b.record(OUTPUT, "logits", torch.tensor([[math.log(3.0), 0.0], [5.0, 4.0]]))
    a.record_evidence(LAYER, "chosen", torch.tensor([[0, 4], [2, 1]]))
    b.record_evidence(LAYER, "chosen", torch.tensor([[4, 0], [2, 7]]))
    comparison = TraceDifferences()
    comparison.add(a, b)
    (predicted,) = comparison.predictions.values()
    assert predicted.kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert (predicted.agreeing, predicted.tokens) == (2, 2)
    choice = comparison.routing[LAYER]
    assert (choice.changed, choice.chosen, choice.tokens) == (1, 4, 1)


def test_parts_without_counterpart_are_left_out_with_the_reason() -> None:
    a, b = Trace(dtype=torch.float32), Trace(dtype=torch.float32)
    a.record(LAYER, "q", torch.ones(2, 3, 4))
    b.record(LAYER, "q", torch.ones(2, 3, 5))
    a.record(LAYER, "latent", torch.ones(2, 4))
    comparison = TraceDifferences()
    comparison.add(a, b)
    assert comparison.places() == []
    assert comparison.left_out == {
        "q": {"of shape [2, 3, 4] in A and [2, 3, 5] in B"},
        "latent": {"not seen in B"},
    }


def test_places_sort_by_when_they_are_computed() -> None:
    places = [
        Place(Block("mtp", 0), "joined"),
        Place(OUTPUT, "logits"),
        *[Place(Block("layer", n), part) for n in (10, 2) for part in reversed(LAYER_PARTS)],
        Place(Block("embedding"), "embedding"),
    ]
    ordered = sorted(places, key=lambda place: place.order)
    assert ordered[0].block.stage == "embedding" and ordered[-2:] == [places[1], places[0]]
    assert [p.part for p in ordered[1 : 1 + len(LAYER_PARTS)]] == list(LAYER_PARTS)
    assert ordered[1].block.number == 2


def test_trace_survives_the_way_between_processes(tmp_path: Path) -> None:
    trace = Trace(dtype=torch.bfloat16)
    trace.record(LAYER, "q", torch.randn(2, 3, 4).bfloat16())
    trace.record_evidence(LAYER, "chosen", torch.tensor([[1, 2]]))
    trace.record_evidence(LAYER, "scale", 0.25)
    save_trace(trace, tmp_path / "trace")
    back = load_trace(tmp_path / "trace", torch.bfloat16)
    for name in ("parts", "evidence"):
        ours, theirs = getattr(trace, name), getattr(back, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[place], theirs[place]) for place in ours)
    assert back.selected_experts()[LAYER].dtype == torch.int64


@settings(max_examples=60, deadline=None)
@given(
    groups=st.sampled_from([(1, 7, 1), (2, 3, 1), (3, 5, 2), (4, 3, 4), (4, 2, 2)]),
    method=st.sampled_from(["greedy", "group_limited_greedy", "noaux_tc"]),
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    flags=st.tuples(st.booleans(), st.booleans()),
    shift=st.sampled_from([0.0, -0.8, -2.0]),
    seed=st.integers(0, 10**6),
)
def test_the_right_rule_is_lowlats(groups, method, scoring, flags, shift, seed) -> None:
    """The auditor and the audited are written twice and must agree on what is right."""
    count, each, kept = groups
    moe = replace(
        MOE,
        n_routed_experts=count * each,
        num_experts_per_tok=2,
        scoring_func=scoring,
        topk_method=method,
        n_group=count,
        topk_group=kept,
        norm_topk_prob=flags[0],
        scale_after_norm=flags[1],
    )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 11, generator=generator, dtype=torch.float64)
    weight = torch.randn(count * each, 11, generator=generator, dtype=torch.float64)
    bias = torch.randn(count * each, generator=generator) + shift if method == "noaux_tc" else None
    expected = route(x, weight, bias, moe)
    scores = gate_scores(x, weight, moe)
    torch.testing.assert_close(scores, expected.scores)
    best = ranking(scores, bias, moe).topk(2, dim=-1).indices
    assert torch.equal(best.sort(-1).values, expected.experts.sort(-1).values)
    torch.testing.assert_close(
        selected_weights(expected.experts, scores, bias, moe), expected.weights
    )


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(rope_theta=100.0),
        RopeConfig(rope_theta=100.0, rope_type="longrope", pair_factors=(1.0, 2.0, 5.0)),
        replace(YARN, factor=8.0, original_max_position_embeddings=64, mscale_all_dim=1.2),
    ],
    ids=["default", "longrope", "yarn"],
)
def test_the_right_rotation_is_lowlats(rope: RopeConfig, interleave: bool) -> None:
    settings_ = replace(rope, rope_interleave=interleave)
    x, positions = torch.randn(5, 3, 6), torch.tensor([0, 1, 7, 100, 5000])
    expected = apply_rope(x, RotaryEmbedding(settings_, 6)(positions), interleave=interleave)
    if interleave:
        expected = torch.cat([expected[..., 0::2], expected[..., 1::2]], dim=-1)
    mine = cos_sin_scale(settings_) * rotate(x, positions, settings_, correct_variant(settings_))
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("folder", ("lowlat", "folder", "fp32", None, False, None)),
        ("org/name@main", ("lowlat", "org/name@main", "fp32", None, False, None)),
        ("org/name@main@int8", ("lowlat", "org/name@main", "int8", None, False, None)),
        ("f@fp64,absorbed", ("lowlat", "f", "fp64", "absorbed", False, None)),
        ("f@native", ("lowlat", "f", "bf16", None, True, None)),
        ("f@native,int4,cache-int8", ("lowlat", "f", "int4", None, True, "int8")),
        ("transformers:f@bf16", ("transformers", "f", "bf16", None, False, None)),
        ("official:m.py:f", ("official", "f", "fp32", None, False, None)),
        ("gguf:f.gguf", ("gguf", "f.gguf", "fp32", None, False, None)),
        ("pypi:a==1/b.gguf", ("lowlat", "pypi:a==1/b.gguf", "fp32", None, False, None)),
    ],
)
def test_sides_as_users_write_them(text: str, expected: tuple) -> None:
    spec = parse(text)
    found = (spec.backend, spec.model, spec.dtype, spec.form, spec.native, spec.cache)
    assert found == expected and spec.text == text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("f@int8,bf16", "int8 and bf16 exclude each other"),
        ("f@bf16,fast", "option 'fast' is unknown"),
        ("f@native,fp32", "do not compute in fp32"),
        ("transformers:f@absorbed", "'absorbed' is an option of lowlat's own models"),
        ("official:f", "not of the form official:MODEL.PY:NAME"),
        ("gguf:f.gguf@bf16", "llama.cpp takes no options"),
        ("transformers:", "names no model"),
    ],
)
def test_sides_that_mean_nothing_are_refused(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_word_behind_a_folder_is_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: taken for a revision of the hub, which was asked for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m" / "v3").mkdir(parents=True)
    for text in ("m/v3@foo", "transformers:m/v3@foo"):
        with pytest.raises(UserError, match=r"option 'foo' is unknown; choose from fp64, .*native"):
            parse(text)
    assert parse("m/v4@foo").model == "m/v4@foo"


def test_random_tokens_depend_on_the_seed_alone() -> None:
    assert random_ids(97, 50, 3) == random_ids(97, 50, 3) != random_ids(97, 50, 4)
    assert set(random_ids(7, 500, 0)) == set(range(7))


def test_configs_differ_in_short_words() -> None:
    """Layers together, and of as many layers or numbers those that differ."""
    whole, free = lowlat_config(MLA), EVERY["layers all"]
    attention, ropes = free.attention, free.rope
    assert isinstance(attention, tuple) and isinstance(ropes, tuple)
    found = config_differences(whole, free)
    assert f"attention: MLA 13 + 6 and {short_name(attention)}" in found
    assert "rope: RopeConfig and RopeConfig by layer" in found
    assert max(map(len, found)) < 100
    wider = replace(attention[1], kv_lora_rank=777)
    again = config_differences(free, replace(free, attention=(attention[0], wider, *attention[2:])))
    assert again == [f"attention[1].kv_lora_rank: {attention[1].kv_lora_rank} and 777"]
    for plain, expected in ((None, "None and 40 numbers"), ((1.0,) * 39 + (2.0,), "2.0 and 1.0")):
        a, b = (
            replace(whole, rope=RopeConfig(rope_type="longrope", rope_theta=9.0, pair_factors=each))
            for each in (plain, (1.0,) * 40)
        )
        (line,) = config_differences(a, b)
        assert line.startswith("rope.pair_factors") and line.endswith(expected)
