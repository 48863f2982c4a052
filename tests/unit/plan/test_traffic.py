"""Volumes of transfers, by counting and by hand."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest

from lowlat.config.model import ModelConfig
from lowlat.plan.job import ParallelLayout, TrainingJob
from lowlat.plan.machine import H800
from lowlat.plan.stages import ROUTED, cut, device_parameters, held
from lowlat.plan.traffic import Transfer, places, transfers
from tests.configs import PLAIN_MOE
from tests.fakes import mla_config

MOE = replace(
    PLAIN_MOE,
    n_routed_experts=16,
    num_experts_per_tok=3,
    first_k_dense_replace=0,
    n_group=4,
    topk_group=2,
)
CONFIG = mla_config(moe=MOE, num_hidden_layers=4, num_nextn_predict_layers=0)


def choices() -> Iterator[tuple[int, ...]]:
    """Every choice of experts, all equally likely: two groups of four, three experts in them."""
    for groups in combinations(range(4), 2):
        open_experts = [4 * group + place for group in groups for place in range(4)]
        yield from combinations(open_experts, 3)


@pytest.mark.parametrize("spread", [1, 2, 4, 8, 16])
def test_places_as_counted(spread: int):
    counts = [len({expert * spread // 16 for expert in chosen}) for chosen in choices()]
    assert places(CONFIG, spread) == pytest.approx(sum(counts) / len(counts))


def sent(job: TrainingJob, rank: int = 0, config: ModelConfig = CONFIG) -> dict[str, Transfer]:
    layout = job.layout
    devices = held(cut(config, layout, (1.0,) * (config.num_hidden_layers + 1)), layout)
    return {found.kind: found for found in transfers(config, job, H800, devices[rank])}


JOB = TrainingJob(
    sequence_length=40, batch_size=96, precision="bf16", layout=ParallelLayout(fsdp=16, zero=1)
)


def test_a_single_device_sends_nothing():
    assert sent(replace(JOB, layout=ParallelLayout())) == {}


def test_experts_within_a_node():
    """Four layers, two directions; 96 / 16 rows of 40 tokens of 23 channels in bf16."""
    found = sent(replace(JOB, layout=ParallelLayout(fsdp=16, expert=8)))["expert dispatch"]
    elsewhere = places(CONFIG, 8) * 7 / 8
    assert found.node_bytes == pytest.approx(2 * 4 * 6 * 40 * 23 * 2 * elsewhere)
    assert found.network_bytes == 0


def test_experts_over_nodes_and_in_fp8():
    job = replace(JOB, precision="fp8", layout=ParallelLayout(fsdp=16, expert=16))
    found = sent(job)
    tokens = 4 * 6 * 40 * 23
    over = places(CONFIG, 2) / 2
    dispatch, combine = found["expert dispatch"], found["expert combine"]
    assert dispatch.network_bytes == pytest.approx(2 * tokens * (1 + 4 / 128) * over)
    assert combine.network_bytes == pytest.approx(2 * tokens * 2 * over)
    again = sent(replace(job, activation_checkpointing="full"))["expert combine"]
    assert again.network_bytes == pytest.approx(combine.network_bytes * 3 / 2)


def test_gradients_and_weights():
    """ZeRO-1: gradients scattered in fp32, weights gathered in bf16 (the embedding has no cast)."""
    found = sent(JOB)["gradients and weights"]
    cut_ = held(cut(CONFIG, JOB.layout, (1.0,) * 5), JOB.layout)[0]
    counts = device_parameters(CONFIG, cut_, JOB.layout)
    expected = sum(
        count * (4 + (4 if part == "embedding" else 2)) * 15 / 16 for part, count in counts.items()
    )
    assert found.node_bytes == pytest.approx(expected)
    # All eight devices of a node share its eight links.
    assert found.network_bytes == pytest.approx(expected / 8)


def test_zero_3_gathers_for_every_micro_batch():
    once = sent(replace(JOB, layout=ParallelLayout(fsdp=16, zero=3), batch_size=16))
    often = sent(replace(JOB, layout=ParallelLayout(fsdp=16, zero=3), batch_size=48))
    for kind in ("gathered weights", "scattered gradients"):
        assert often[kind].node_bytes == pytest.approx(3 * once[kind].node_bytes)
    assert "gradients and weights" not in often


def test_pipeline_tensor_and_context():
    piped = sent(replace(JOB, layout=ParallelLayout(pipeline=4, fsdp=16)))["pipeline"]
    assert piped.network_bytes == 2 * 6 * 40 * 23 * 2
    tensor = sent(replace(JOB, layout=ParallelLayout(tensor=5, fsdp=16)))["tensor parallel"]
    # Four gathers or scatters each way; the other four fifths of a row of tokens.
    assert tensor.node_bytes == pytest.approx(2 * 4 * 4 * 6 * 40 * 4 / 5 * 23 * 2)
    ring = sent(replace(JOB, layout=ParallelLayout(context=2, fsdp=4)))["context parallel"]
    assert ring.node_bytes == pytest.approx(3 * 4 * 24 * 20 * 17 * 2)
    # The processes of one place along fsdp are as far apart as all of fsdp.
    far = sent(replace(JOB, layout=ParallelLayout(context=2, fsdp=8)))["context parallel"]
    assert far.network_bytes == pytest.approx(3 * 4 * 12 * 20 * 17 * 2) and not far.node_bytes


@pytest.mark.parametrize("outer", [{"data": 4}, {"context": 4}])
def test_only_fsdp_shares_states(outer: dict[str, int]):
    """Of 4 x 8 processes: what is gathered stays within the nodes of eight, experts that no two of
    them have are not gathered, and gradients are summed over the four once per step.
    """
    job = replace(JOB, layout=ParallelLayout(fsdp=8, expert=8, zero=3, **outer))
    found = sent(job)
    stages = held(cut(CONFIG, job.layout, (1.0,) * 5), job.layout)[0]
    counts = device_parameters(CONFIG, stages, job.layout)
    experts = counts.pop(ROUTED)
    gathered = sum(n * (4 if part == "embedding" else 2) for part, n in counts.items()) * 7 / 8
    weights, gradients = found["gathered weights"], found["scattered gradients"]
    assert weights.node_bytes == pytest.approx(2 * job.micro_batches * gathered)
    assert gradients.node_bytes == pytest.approx(
        job.micro_batches * 4 * sum(counts.values()) * 7 / 8
    )
    assert weights.network_bytes == gradients.network_bytes == 0
    once = found["gradients and weights"]
    own = sum(counts.values()) / 8 + experts
    assert once.network_bytes == pytest.approx(2 * 4 * own * 3 / 4) and once.is_per_step
