"""Bytes of weights that stay as stored, against the tensors of a GGUF file."""

from pathlib import Path

import pytest
from gguf import GGUFReader

from lowlat.bench.benchmark_plan import STORED, BenchmarkCase
from lowlat.bench.roofline import step_cost
from lowlat.bench.stored_weights import stored_weights
from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import read_config
from lowlat.convert.run import convert

from .benchmarks import random_checkpoint


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
    sizes.pop("token_embd.weight")
    experts = sum(size for name, size in sizes.items() if "_exps" in name)
    found = stored_weights(source, config)
    assert found is not None
    assert found.shared == sum(sizes.values()) - experts
    assert found.read_bytes(config.moe.n_routed_experts) == pytest.approx(sum(sizes.values()))
    step = BenchmarkCase(kind="decode", tokens=9)
    cost = step_cost(config, step, dtype=STORED, weights=found, entry_bytes=1)
    assert cost.weight_bytes == found.read_bytes(config.moe.num_experts_per_tok)


def test_plain_weights_have_none(folder: Path) -> None:
    source = open_checkpoint(folder)
    assert stored_weights(source, read_config(source)) is None
