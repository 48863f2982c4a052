"""Estimates of serving: shares of ranks against the whole, memory and times by hand, ranking."""

from dataclasses import replace

import pytest

from lowlat.config.attention import AttentionConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.config.presets import load_preset
from lowlat.config.serving_layout import ServingLayout
from lowlat.config.weight_memory import weight_bytes
from lowlat.plan.serving.estimate import (
    ServingEstimate,
    ServingJob,
    embedding_bytes,
    estimate,
)
from lowlat.plan.serving.expert_load import busiest_rank
from lowlat.plan.serving.layout import check_layout, stage_layers
from lowlat.plan.serving.machines import Cluster, ServingMachine, parse_cluster
from lowlat.plan.serving.search import all_layouts, by_speed, rank_layouts
from lowlat.plan.serving.step_cost import RankShare, Step, entry_bytes, step_cost
from lowlat.plan.serving.traffic import step_messages
from lowlat.plan.serving.weights import dtype_weights, gguf_weights
from lowlat.utils.errors import UserError
from tests.lowlat_configs import GLA, GTA, TPA, lowlat_config

V3 = load_preset("deepseek-v3")
LLAMA = load_preset("llama-3.1-8b")
REPEATED = 61 * 7168 * (1536 + 576) + 58 * 256 * 7169
"""Weights of V3 that tensor-parallel ranks repeat."""
ROUND = ServingMachine(
    name="round",
    memory_bytes=10**12,
    reserve_bytes=0,
    devices=2,
    devices_per_node=2,
    flops={"bf16": 1e13, "fp32": 1e12},
    memory_bandwidth=1e11,
    node_bandwidth=1e10,
    network_bandwidth=1e9,
    product_share=1.0,
    attention_share=1.0,
    decode_attention_share=1.0,
    memory_share=1.0,
    link_share=1.0,
    node_latency=1e-6,
    network_latency=1e-5,
    layer_seconds=0.0,
)


def job(**changes: object) -> ServingJob:
    own = {
        "weights": dtype_weights(V3, "fp8"),
        "dtype": "bf16",
        "users": 1,
        "context": 4096,
        "prompt": 2048,
    }
    return ServingJob(**own | changes)  # pyright: ignore[reportArgumentType]


def v3(layout: str, machines: int = 4, **changes: object) -> ServingEstimate:
    cluster = Cluster(machine=ROUND, machines=machines)
    shape = ServingLayout.parse(layout) if layout else ServingLayout()
    return estimate(V3, job(**changes), cluster, shape)


@pytest.mark.parametrize("dtype", ["fp8", "bf16", "int4"])
def test_weights_are_those_of_the_config(dtype: str):
    assert dtype_weights(V3, dtype).total(V3) == weight_bytes(V3, dtype)


def test_gguf_types_count_all_weights_at_their_bits():
    count = count_parameters(V3)
    stored = count.total + count.mtp
    assert gguf_weights(V3, 4.5).total(V3) == pytest.approx(stored * 4.5 / 8)


@pytest.mark.parametrize(
    "layout", [{"tensor": 2}, {"pipeline": 4}, {"tensor": 2, "expert": 4, "pipeline": 2}]
)
def test_shares_of_all_ranks_make_up_the_whole(layout: dict[str, int]):
    """With equal parts of experts and tokens, all ranks have the bytes and FLOPs of one process;
    tensor-parallel ranks repeat down-projections to latents, and gates."""
    shape = ServingLayout(**layout)
    step, weights = Step(sequences=8, context=1000), dtype_weights(V3, "bf16")
    whole = step_cost(V3, step, weights, share=RankShare(experts=256, choices=64))
    ranks = shape.stage_size
    total_bytes = flops = attention = 0.0
    for layers in stage_layers(V3, shape.pipeline):
        share = RankShare(
            layers=layers,
            has_head=layers.stop == 61,
            tensor=shape.tensor,
            experts=256 / ranks,
            choices=64 / ranks,
        )
        cost = step_cost(V3, step, weights, share=share)
        copies = ranks / shape.tensor
        routed = weights.expert / 58 * 256 * sum(V3.is_moe_layer(layer) for layer in layers)
        total_bytes += (cost.weight_bytes - routed / ranks) * ranks / copies + routed
        flops += cost.weight_flops
        attention += cost.attention_flops * shape.tensor
    more = REPEATED * (shape.tensor - 1)
    assert total_bytes == pytest.approx(whole.weight_bytes + 2 * more, rel=1e-5)
    assert attention == pytest.approx(whole.attention_flops)
    if shape.expert == 1:
        assert flops * ranks == pytest.approx(whole.weight_flops + 2 * 8 * more, rel=1e-5)


def test_a_step_takes_what_its_bytes_take():
    found = v3("")
    weights = dtype_weights(V3, "fp8")
    cache = 4097 * 61 * 576 * 2
    assert found.decode.weights == pytest.approx(weights.read_bytes(8) / 1e11)
    assert found.decode.attention == pytest.approx(max(cache / 1e11, 61 * 128 * 4097 * 2176 / 1e13))
    assert found.per_user == pytest.approx(1 / found.decode.total)
    assert found.decode.limit == "weight bandwidth"
    assert found.decode.messages == 0


def test_memory_is_of_the_fullest_rank():
    found = v3("", users=16)
    assert found.replicas == 8
    assert found.memory["weights"] == pytest.approx(weight_bytes(V3, "fp8"))
    assert found.memory["KV cache"] == 2 * 4096 * 62 * 576 * 2
    halves = v3("tensor=2")
    embedding = V3.vocab_size * V3.hidden_size * 2
    mtp = dtype_weights(V3, "fp8").mtp
    whole = weight_bytes(V3, "fp8") - embedding - mtp
    expected = (whole + REPEATED) / 2 + embedding + mtp / 2
    assert halves.memory["weights"] == pytest.approx(expected, rel=1e-3)
    assert halves.memory["KV cache"] == 4096 * 62 * 576 * 2  # every rank has the latents


def test_gqa_divides_its_cache_among_tensor_ranks():
    assert entry_bytes(LLAMA, "bf16") == 32 * 2 * 8 * 128 * 2
    assert entry_bytes(LLAMA, "bf16", tensor=4) == 32 * 2 * 2 * 128 * 2


def test_what_is_missing_is_named():
    small = replace(ROUND, memory_bytes=100 * 10**9)
    found = estimate(V3, job(), Cluster(machine=small), ServingLayout(tensor=2))
    assert not found.fits
    assert found.missing_bytes == pytest.approx(found.total_bytes - 100e9)
    ranked = rank_layouts(V3, job(), Cluster(machine=small), [ServingLayout(), found.layout])
    assert not ranked.fitting
    assert [each.layout for each in ranked.too_large] == [found.layout, ServingLayout()]


def test_stages_compute_one_after_another():
    """A batch too small for micro-batches waits for all stages; a large one keeps all busy."""
    one, two = v3("", machines=1), v3("pipeline=2", machines=1)
    assert two.per_user == pytest.approx(one.per_user, rel=0.01)
    many = v3("pipeline=2", machines=1, users=1024, context=64)
    assert many.per_user == pytest.approx(1 / (2 * many.decode.total))


def test_messages_of_tensor_parallelism():
    found = {
        m.kind: m
        for m in step_messages(V3, ServingLayout(tensor=2), ROUND, tokens=3, layers=range(1))
    }
    widths = 128 * 128, 7168, 18432, 7168
    assert found["tensor"].sent_bytes == 3 * sum(widths) / 2 * 2
    assert found["tensor"].messages == 4
    assert "expert" not in found  # a dense layer
    assert found["tensor"].seconds(ROUND) == pytest.approx(4e-6 + 3 * sum(widths) / 1e10)
    far = step_messages(V3, ServingLayout(tensor=4), ROUND, tokens=3, layers=range(1))[0]
    assert not far.is_local
    assert far.seconds(ROUND) == pytest.approx(12e-5 + 3 * sum(widths) / 4 * 3 * 2 / 1e9)


def test_a_sequence_is_not_divided_by_data_parallel_attention():
    """One user has the same attention with and without it; of 12, the fullest of 8 ranks has 2."""
    alone, divided = (
        v3("expert=8", context=10_000, is_data_parallel=is_used) for is_used in (False, True)
    )
    assert divided.decode.attention == alone.decode.attention
    assert divided.memory == alone.memory
    twelve = v3("expert=8", users=12, context=10_000, is_data_parallel=True)
    assert twelve.decode.attention == pytest.approx(2 * alone.decode.attention)
    assert twelve.memory["KV cache"] == 2 * alone.memory["KV cache"]
    step, weights = Step(sequences=12), dtype_weights(V3, "bf16")
    flops, own = (
        step_cost(V3, each, weights, share=RankShare(experts=1, choices=0, data=data)).weight_flops
        for each, data in ((step, 8), (Step(sequences=2), 1))
    )
    assert flops == own


def test_messages_are_of_a_rank_s_own_sequences():
    """tensor=2,expert=8: 4 ranks have different sequences, and of 10 users the fullest has 3."""
    found = v3("tensor=2,expert=8,pipeline=1", users=10, is_data_parallel=True)
    choices = busiest_rank(V3.moe, 10, 8).choices if V3.moe else 0.0
    own = {
        "tensor": 3 * (61 * (128 * 128 + 7168) + 3 * (18432 + 7168) + 58 * (2048 + 7168)) * 2 / 2
        + 3 * V3.vocab_size * 4 / 2,
        "expert": 58 * choices * 7168 * 7 / 8 * 3,
    }
    assert found.sent_bytes == pytest.approx(8 * sum(own.values()) / 10)
    staged = v3("expert=4,pipeline=2", users=10, is_data_parallel=True)
    # the fullest of 4 ranks has 3 sequences
    choices = busiest_rank(V3.moe, 10, 4).choices if V3.moe else 0.0
    expected = 58 * choices * 7168 * 3 / 4 * 3 + 3 * (2 * 7168 * 2 + V3.vocab_size * 4)
    assert staged.sent_bytes == pytest.approx(4 * expected / 10)


def test_tied_embeddings_are_in_the_first_and_last_stage():
    tied = replace(LLAMA, tie_word_embeddings=True)
    weights = dtype_weights(tied, "bf16")
    assert weights.embedding == 0
    one = job(weights=weights)

    def held(**layout: int) -> int | float:
        cluster = Cluster(machine=ROUND)
        return estimate(tied, one, cluster, ServingLayout(**layout)).memory["weights"]

    rows = LLAMA.vocab_size * LLAMA.hidden_size * 2
    assert held() == pytest.approx(weights.total(tied))
    stages = ((True, False), (False, False), (False, True))
    found = [
        embedding_bytes(weights, ServingLayout(pipeline=3), is_first=first, is_last=last)
        for first, last in stages
    ]
    assert found == [rows, 0, 0]  # the last has it as its head
    # the last stage has the head and two layers less
    first = (weights.total(tied) - rows) * 17 / 32 + rows
    assert held(pipeline=2) == pytest.approx(first, rel=1e-4)
    assert held(tensor=2) == pytest.approx((weights.total(tied) - rows) / 2 + rows, rel=1e-4)


def test_messages_of_experts_and_stages():
    layout = ServingLayout(expert=4, pipeline=2)
    sent = step_messages(V3, layout, ROUND, tokens=2, layers=range(3, 5), choices=7.0)
    found = {message.kind: message for message in sent}
    assert found["expert"].sent_bytes == 2 * (7 * 7168 * 2 * 3)
    assert found["expert"].messages == 2 * 3
    assert found["pipeline"].sent_bytes == 2 * 7168 * 2
    assert "tensor" not in found
    last = step_messages(V3, layout, ROUND, tokens=2, sequences=2, layers=range(60, 61))[-1]
    assert last.sent_bytes == 2 * (7168 * 2 + V3.vocab_size * 4)


def test_the_busiest_rank_has_more_than_the_mean():
    moe = V3.moe
    assert moe is not None
    assert busiest_rank(moe, 1, 1).experts == pytest.approx(8)
    one = busiest_rank(moe, 1, 4)
    assert 3 < one.experts < 5
    many = busiest_rank(moe, 4096, 4)
    assert many.experts == pytest.approx(64, rel=0.001)
    assert 1 < many.choices / (4096 * 8 / 4) < 1.05
    assert busiest_rank(moe, 4096, 4, 1.5).choices == pytest.approx(1.5 * many.choices)


def test_layouts_divide_devices_and_model():
    layouts = all_layouts(V3, Cluster(machine=ROUND, machines=4))
    assert ServingLayout() in layouts and ServingLayout(tensor=2, expert=4, pipeline=2) in layouts
    assert all(8 % layout.processes == 0 for layout in layouts)
    assert all(each.expert == 1 for each in all_layouts(LLAMA, Cluster(machine=ROUND, machines=4)))
    ranked = rank_layouts(V3, job(), Cluster(machine=ROUND, machines=4), layouts)
    rates = [each.tokens_per_second for each in ranked.fitting]
    assert rates[0] >= 0.98 * max(rates) and rates[-1] == min(rates)


def test_near_equal_layouts_are_ranked_by_time_to_first_token():
    """Wherever their throughputs lie: 1 % below the fastest, in any step of a scale."""
    one = v3("")

    def made(rate: float, first_token: float) -> ServingEstimate:
        return replace(one, tokens_per_second=rate, first_token=first_token)

    found = [made(99.7, 3.0), made(100.0, 9.0), made(99.4, 1.0), made(50.1, 2.0), made(50.0, 1.0)]
    assert [each.first_token for each in by_speed(found)] == [1.0, 3.0, 9.0, 1.0, 2.0]


def test_expert_parallelism_needs_experts():
    with pytest.raises(UserError, match="expert=2: the model has no routed experts"):
        check_layout(LLAMA, ServingLayout(expert=2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensor=0", "write tensor=SIZE with a size from 1"),
        ("heads=2", "'heads' is none of tensor, pipeline, expert"),
        ("tensor=2,tensor=4", "tensor is given twice"),
        ("tensor=3", "must divide the 128 attention heads"),
        ("expert=3", "must divide the 256 routed experts"),
        ("tensor=4,expert=2,pipeline=62", "the model's layers divide into at most 61 stages"),
        ("tensor=8,expert=64,pipeline=80", "the model's layers divide into at most 61 stages"),
    ],
)
def test_layouts_that_cannot_be_are_refused(text: str, message: str):
    with pytest.raises(UserError, match=message):
        check_layout(V3, ServingLayout.parse(text))


@pytest.mark.parametrize("form", [GLA, GTA, TPA])
def test_attention_that_is_not_divided_by_heads(form: AttentionConfig):
    config = lowlat_config(form)
    check_layout(config, ServingLayout(pipeline=2))
    with pytest.raises(UserError, match="tensor=2: only MLA, MHA, GQA and MQA are divided"):
        check_layout(config, ServingLayout(tensor=2))


def test_the_smaller_of_tensor_and_expert_divides_the_larger():
    six = replace(V3, moe=V3.moe and replace(V3.moe, n_routed_experts=192))
    with pytest.raises(UserError, match="the smaller must divide the larger"):
        check_layout(six, ServingLayout(tensor=2, expert=3))
    check_layout(six, ServingLayout(tensor=2, expert=6))


def test_published_decode_of_deepseek():
    """DeepSeek's inference report (2025): 14,800 decoded tokens per second and node of 8 H800 at 20
    to 22 tokens per second and user, 4,989 cached tokens on average, expert parallelism over 18
    nodes. docs/planning-serving.md explains the differences.
    """
    nodes = 16
    cluster = parse_cluster(f"{8 * nodes}xh800")
    work = job(dtype="fp8", users=88 * 8 * nodes, context=4989, is_data_parallel=True)
    found = estimate(V3, work, cluster, ServingLayout(expert=8 * nodes))
    assert found.fits
    assert 14_800 / 1.3 < found.tokens_per_second / nodes < 14_800 * 1.3
    assert 16 < found.per_user < 28


def test_published_decode_of_cpus():
    """ktransformers on one EPYC 9654 with Q4 weights: 14 tokens per second at 1,000 cached."""
    work = job(weights=gguf_weights(V3, 4.85), context=1000)
    found = estimate(V3, work, parse_cluster("epyc-9654"), ServingLayout())
    assert found.per_user == pytest.approx(14, rel=0.3)
