"""Models of the family in files: every bit comes back, and what is read generates the same."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.model.linear import Linear
from lowlat.utils.errors import UserError
from tests.lowlat_configs import EVERY, LAYERS, random_model

from .builders import assert_same_bits, rewrite, write_model

every_config = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


@every_config
def test_round_trip(tmp_path: Path, config: ModelConfig) -> None:
    model = random_model(config, torch.bfloat16)
    save_model(model, config, tmp_path / "model", source=None, max_shard_bytes=9000)
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    assert_same_bits(model, loaded.model)


@pytest.mark.parametrize("name", ["gla-2", "gta-3", "tpa", "layers all", "layers still"])
def test_round_trip_of_fp8_blocks(tmp_path: Path, name: str) -> None:
    quantization = QuantConfig(weight_block_size=(8, 5))
    config = replace(EVERY[name], quantization=quantization, num_nextn_predict_layers=1)
    model = write_model(tmp_path / "model", config)
    loaded = load_model(tmp_path / "model")
    assert loaded.config == config
    assert_same_bits(model, loaded.model)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_layers_that_differ_are_packed_at_load(tmp_path: Path, name: str, dtype: str) -> None:
    """Every projection from the values in the file, whatever its widths."""
    model = write_model(tmp_path / "model", LAYERS[name])
    plain = {path: m for path, m in model.named_modules() if isinstance(m, Linear)}
    packed = load_model(tmp_path / "model", dtype=dtype).model
    found = {path: m for path, m in packed.named_modules() if isinstance(m, Linear)}
    assert found.keys() == plain.keys() and len(found) > 8
    for path, linear in found.items():
        assert linear.storage != "plain"
        parts = linear.pack(plain[path].dense_weight(torch.float32))
        for part, value in parts.items():
            assert torch.equal(getattr(linear, part), value), (path, part)


def test_names_in_files(tmp_path: Path) -> None:
    """MTP modules and experts lie where Hugging Face's families have them."""
    for name, own in (
        ("gla", "kv_a_layernorm.1.weight"),
        ("gta", "kv_proj_with_mqa.weight"),
        ("tpa", "v_b_proj.weight"),
        ("gqa", "k_proj.weight"),
    ):
        config = EVERY[f"combined {name}"]
        write_model(tmp_path / name, config)
        names = set(load_file(tmp_path / name / "model.safetensors"))
        assert f"model.layers.0.self_attn.{own}" in names
        assert f"model.layers.2.self_attn.{own}" in names
        assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.norm.weight"} <= names
        assert "model.layers.1.mlp.experts.6.down_proj.weight" in names


def test_a_latent_without_norm_is_stored_unpadded(tmp_path: Path) -> None:
    """The padded layout is for programs that read deepseek_v3; this family needs none."""
    write_model(tmp_path / "model", EVERY["combined mla-plain"])
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"].shape == (19, 23)
    assert "model.layers.0.self_attn.kv_a_layernorm.weight" not in tensors


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model", EVERY["gla-2"])
    gone = "model.layers.1.self_attn.kv_a_layernorm.1.weight"
    rewrite(tmp_path / "model", lambda tensors: tensors.pop(gone))
    with pytest.raises(UserError, match=gone):
        load_model(tmp_path / "model")
