"""Expert load balancing while serving (EPLB): replicas change no bit, placements follow the loads
since the last one, moved experts come from the checkpoint with their adapters."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.read_experts import read_experts
from lowlat.checkpoint.save import save_model
from lowlat.engine.expert_balancer import ExpertBalancer, ExpertBalancing, experts_of
from lowlat.engine.runner import ModelRunner
from lowlat.generate.model import Model
from lowlat.model.lora import LoraLinear, add_adapters
from lowlat.model.moe import MoE
from lowlat.model.native import NativeModel
from lowlat.model.share import ModelShare, RemoteModule, place_experts
from lowlat.model.transformer import Transformer
from lowlat.ops import native
from tests import configs
from tests.fakes import byte_tokenizer, mla_config, tiny_model
from tests.lora import drawn_updates

MOE = replace(configs.PLAIN_MOE, n_routed_experts=6)
CONFIG = mla_config(
    moe=MOE,
    num_hidden_layers=3,
    num_nextn_predict_layers=0,
)
SHARE = ModelShare(
    layers=range(3), is_first=True, is_last=True, experts=2, expert_rank=1, redundant_experts=2
)
LOADS = {
    1: [[9, 1, 1, 1, 1, 3], [10, 2, 1, 90, 2, 5]],
    2: [[2, 7, 1, 8, 0, 3], [2, 8, 60, 8, 1, 4]],
}
"""Counts of every expert by layer, before the first and the second placement."""


class Counts(NativeModel):
    """Stands in for the native kernels of one of two processes."""

    def __init__(self) -> None:
        self.placements = 0
        self.layers: list[int] = []
        self.counts = False

    def count_expert_loads(self) -> None:
        self.counts = True

    def expert_loads(self) -> dict[int, Sequence[int]]:
        assert self.counts
        self.placements += 1
        return {layer: counts[self.placements - 1] for layer, counts in LOADS.items()}

    def place_experts(self, layer: int, mlp: MoE) -> None:
        experts = experts_of(mlp)
        assert not any(isinstance(experts[number], RemoteModule) for number in experts.own)
        self.layers.append(layer)


def _moe(model: Transformer, layer: int) -> MoE:
    mlp = cast(Any, model.layers[layer]).mlp
    assert isinstance(mlp, MoE)
    return mlp


def test_experts_are_placed_by_their_new_loads_and_read_with_adapters(tmp_path: Path) -> None:
    whole = tiny_model(CONFIG, torch.bfloat16)
    adapter = drawn_updates(whole, rank=2, seed=1)
    save_model(whole, CONFIG, tmp_path / "model", source=None)
    add_adapters(whole, [adapter])
    model = load_model(tmp_path / "model", dtype="bf16", divide=lambda config: SHARE).model
    add_adapters(model, [adapter])
    counts = Counts()
    load = partial(read_experts, tmp_path / "model", [adapter], dtype="bf16")
    balancing = ExpertBalancing(step_interval=2, load=load)
    balancer = ExpertBalancer(model, counts, balancing)
    assert [balancer.is_due() for _ in range(4)] == [False, True, False, True]
    for loads in (
        [LOADS[1][0], LOADS[2][0]],
        [[1, 1, 0, 89, 1, 2], [0, 1, 59, 0, 1, 1]],
    ):
        balancer.rebalance()
        expected = place_experts(torch.tensor(loads), SHARE, groups=MOE.n_group)
        assert [experts_of(_moe(model, layer)).places for layer in (1, 2)] == expected
    assert counts.layers == [1, 2, 1, 2] and balancer.num_moved > 0
    for layer, places in zip((1, 2), expected, strict=True):
        own = set(places[4:])
        for number, expert in enumerate(experts_of(_moe(model, layer))):
            assert isinstance(expert, RemoteModule) == (number not in own)
            if number in own:
                _check_equal(expert, experts_of(_moe(whole, layer))[number])


def _check_equal(expert: torch.nn.Module, expected: torch.nn.Module) -> None:
    """The same weights and updates."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        own, other = getattr(expert, name), getattr(expected, name)
        assert isinstance(own, LoraLinear) and isinstance(other, LoraLinear)
        assert torch.equal(own.weight, other.weight)
        ((update,), (wanted,)) = own.updates, other.updates
        assert update is not None and wanted is not None
        assert torch.equal(update.a, wanted.a) and torch.equal(update.b, wanted.b)


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
@pytest.mark.parametrize("places", [[0, 0, 1, 2, 3, 4, 5, 5], [0, 1, 1, 1, 1, 2, 3, 3, 4, 5]])
def test_replicas_change_no_bit(places: list[int]) -> None:
    """The rows of an expert are divided among its replicas, here of one process."""
    transformer = tiny_model(CONFIG, torch.bfloat16)
    add_adapters(transformer, [drawn_updates(transformer, rank=2, seed=1)])
    model = Model(transformer, byte_tokenizer(), name="m")
    ids = [(7 * place) % 251 for place in range(50)]
    before = _results(model, ids)
    kernels = cast(NativeModel, model.runner._native)
    assert kernels.expert_loads() == {}
    kernels.count_expert_loads()
    _results(model, ids)
    loads = kernels.expert_loads()
    for layer in (1, 2):
        mlp = _moe(transformer, layer)
        experts_of(mlp).places = places
        kernels.place_experts(layer, mlp)
    after = _results(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    again = kernels.expert_loads()
    assert sorted(loads) == [1, 2]
    for layer, counts in loads.items():
        assert sum(counts) == MOE.num_experts_per_tok * sum(map(len, (ids, ids[:1])))
        assert list(again[layer]) == [2 * count for count in counts]


def _results(model: Model, ids: list[int]) -> list[Tensor]:
    """Logits of a prompt and of a single token."""
    return [model.logits(ids), model.logits(ids[:1])]


@pytest.mark.skipif(not native.available(), reason="needs the native kernels")
@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([0, 1, 2, 3, 4, 4], "an expert has no place"),
        ([0, 2, 1, 3, 4, 5], "a process's experts do not ascend"),
        ([0, 1, 2, 3, 4], "has no place"),
    ],
)
def test_kernels_refuse_wrong_places(places: list[int], message: str) -> None:
    transformer = tiny_model(CONFIG, torch.bfloat16)
    runner = ModelRunner(transformer)
    mlp = _moe(transformer, 1)
    experts_of(mlp).places = places
    with pytest.raises(ValueError, match=message):
        cast(NativeModel, runner._native).place_experts(1, mlp)
