"""Single experts of a checkpoint are those of the whole model, in every storage."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.read_experts import read_experts
from lowlat.checkpoint.save import save_model
from tests import configs
from tests.fakes import mla_config, tiny_model

CONFIG = mla_config(
    moe=replace(configs.PLAIN_MOE, n_routed_experts=6),
    num_hidden_layers=3,
    num_nextn_predict_layers=0,
)
WANTED = {1: {0, 5}, 2: {3}}


@pytest.mark.parametrize("stored", ["bf16", "int4"])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8", "int4"])
def test_experts_are_those_of_the_whole_model(tmp_path: Path, stored: str, dtype: str) -> None:
    save_model(tiny_model(CONFIG, torch.bfloat16), CONFIG, tmp_path / "plain", source=None)
    folder = tmp_path / "plain"
    if stored != "bf16":
        packed = load_model(folder, dtype=stored).model
        folder = tmp_path / stored
        save_model(packed, replace(CONFIG, packing="int4"), folder, source=None)
    whole = load_model(folder, dtype=dtype, keeps_blocks=True).model
    found = read_experts(folder, [], WANTED, dtype=dtype)
    assert {layer: set(own) for layer, own in found.items()} == WANTED
    for layer, own in found.items():
        for number, module in own.items():
            expected = whole.get_submodule(f"layers.{layer}.mlp.experts.{number}").state_dict()
            weights = module.state_dict()
            assert weights.keys() == expected.keys()
            for name, weight in weights.items():
                assert weight.dtype == expected[name].dtype and not weight.is_meta
                assert torch.equal(weight.view(torch.uint8), expected[name].view(torch.uint8))


def test_no_experts_are_read_from_no_checkpoint(tmp_path: Path) -> None:
    assert read_experts(tmp_path / "absent", [], {1: set()}, dtype="bf16") == {}
