"""Checkpoints with sparse attention (DSA): names, fp8 blocks, and tensors that do not fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowlat.checkpoint.load import load_model

from .builders import FAMILIES, assert_refused, assert_same_bits, rewrite, write_model

INDEXER = "model.layers.1.self_attn.indexer."
NAMES = ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")


def test_names(tmp_path: Path) -> None:
    """Those of the released files; in layers that share a choice there are none."""
    write_model(tmp_path / "full", FAMILIES["deepseek_v32"])
    write_model(tmp_path / "sharing", FAMILIES["glm_moe_dsa-sharing"])
    full = load_file(tmp_path / "full" / "model.safetensors")
    assert {name for name in full if name.startswith(INDEXER)} == {INDEXER + name for name in NAMES}
    sharing = load_file(tmp_path / "sharing" / "model.safetensors")
    layers = {name.split(".")[2] for name in sharing if ".indexer." in name}
    assert layers == {"0", "2"}  # the first layer, and the MTP module


def test_fp8_blocks(tmp_path: Path) -> None:
    """wq_b and wk are in blocks, weights_proj is plain, as released."""
    written = write_model(tmp_path / "m", FAMILIES["deepseek_v32-fp8"])
    stored = load_file(tmp_path / "m" / "model.safetensors")
    for name, is_quantized in (("wq_b", True), ("wk", True), ("weights_proj", False)):
        dtype = torch.float8_e4m3fn if is_quantized else torch.bfloat16
        assert stored[f"{INDEXER}{name}.weight"].dtype == dtype
        assert (f"{INDEXER}{name}.weight_scale_inv" in stored) == is_quantized
    assert_same_bits(load_model(tmp_path / "m").model, written)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    write_model(tmp_path / "m", FAMILIES["deepseek_v32"])
    rewrite(tmp_path / "m", lambda tensors: tensors.pop(INDEXER + name))
    assert_refused(
        lambda: load_model(tmp_path / "m"), tmp_path / "m", f"{INDEXER}{name}' is missing"
    )


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["deepseek_v32"])
    wrong = {f"{INDEXER}wq_b.weight": torch.zeros(39, 11)}
    rewrite(tmp_path / "m", lambda tensors: tensors.update(wrong))
    words = "wq_b.weight' has shape [39, 11], but the config asks for [40, 11]"
    assert_refused(lambda: load_model(tmp_path / "m"), tmp_path / "m", words)


def test_an_indexer_in_a_layer_that_shares_is_left_over(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["glm_moe_dsa-sharing"])
    extra = {f"{INDEXER}wk.weight": torch.zeros(8, 23)}
    rewrite(tmp_path / "m", lambda tensors: tensors.update(extra))
    assert_refused(lambda: load_model(tmp_path / "m"), tmp_path / "m", "has no place in the model")
