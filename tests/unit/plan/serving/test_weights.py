"""Bytes of weights that stay as stored, against the tensors of a GGUF file."""

from pathlib import Path

import pytest
from gguf import GGUFReader

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.convert.run import convert
from lowlat.plan.serving.step_cost import Step, step_cost
from lowlat.plan.serving.weights import stored_weights
from tests.unit.bench.benchmarks import random_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "tiny"
    random_checkpoint().write("tiny", path, seed=0)
    return path


def test_bytes_are_those_of_the_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    convert(folder, file, dtype="int4")
    source = open_checkpoint(file)
    config = read_config(source)
    assert config.moe is not None
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(file).tensors}
    embedding = sizes.pop("token_embd.weight")
    experts = sum(size for name, size in sizes.items() if "_exps" in name)
    found = stored_weights(source, config)
    assert found is not None
    assert found.layers == sum(sizes.values()) - experts - sizes["output.weight"]
    assert found.total(config) == pytest.approx(sum(sizes.values()) + embedding)
    assert found.read_bytes(config.moe.n_routed_experts) == pytest.approx(sum(sizes.values()))
    cost = step_cost(config, Step(context=9), found)
    assert cost.weight_bytes == found.read_bytes(config.moe.num_experts_per_tok)


def test_plain_weights_have_none(folder: Path) -> None:
    source = open_checkpoint(folder)
    assert stored_weights(source, read_config(source)) is None
