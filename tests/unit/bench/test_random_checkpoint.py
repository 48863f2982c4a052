"""Random checkpoints: the same for the same seed, of the sizes they claim, loadable."""

from pathlib import Path

import pytest
import torch

import lowlat
from lowlat.config.kv_cache_size import kv_cache_size
from lowlat.config.parameter_count import count_parameters
from lowlat.utils.errors import UserError

from .benchmarks import random_checkpoint

GENERATOR = random_checkpoint()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        GENERATOR.write("tiny", tmp_path / name, seed=seed)
    first, second, third = (contents(tmp_path / name) for name in "abc")
    assert first == second
    assert first["model.safetensors"] != third["model.safetensors"]
    assert first["config.json"] == third["config.json"]


def test_mini_has_the_published_sizes() -> None:
    config = GENERATOR.config_of("mini")
    count, cost = count_parameters(config), kv_cache_size(config)
    assert round(count.total / 1e6, 1) == 721.8
    assert round(count.active_without_embedding / 1e6, 1) == 204.6
    assert cost.bytes_per_token(cost.elements_per_token_layer, "bf16") == 13_824


def test_the_model_loads_and_every_part_matters(tmp_path: Path) -> None:
    GENERATOR.write("tiny", tmp_path / "tiny", seed=0)
    model = lowlat.load(str(tmp_path / "tiny"), dtype="fp32")
    gate = model.transformer.layers[1].mlp.gate
    bias = gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and (bias < 0).any() and (bias > 0).any()
    assert model.tokenizer.decode(model.tokenizer.encode("tea é")) == "tea é"
    assert len({round(float(v), 4) for v in model.logits([1, 2, 3])[-1]}) > 400


def test_unknown_presets_are_named() -> None:
    with pytest.raises(UserError, match="preset 'maxi' is unknown; choose one of mini"):
        GENERATOR.config_of("maxi")
