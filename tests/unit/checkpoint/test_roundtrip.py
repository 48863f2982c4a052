"""load -> save -> load gives every bit back, for every family, one file or many shards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model

from .builders import FAMILIES, assert_same_bits, write_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 4000])
def test_round_trip(tmp_path: Path, family: str, max_shard_bytes: int) -> None:
    """Router bias in fp32, ragged fp8 blocks, MTP with and without copies, padded latents."""
    config = FAMILIES[family]
    first = write_model(tmp_path / "first", config)
    loaded = load_model(tmp_path / "first")
    assert loaded.config == config
    assert_same_bits(first, loaded.model)
    save_model(
        loaded.model,
        loaded.config,
        tmp_path / "second",
        source=None,
        max_shard_bytes=max_shard_bytes,
    )
    again = load_model(tmp_path / "second")
    assert again.config == config
    assert_same_bits(first, again.model)
    assert (tmp_path / "second" / "model.safetensors").exists() == (max_shard_bytes == 10**9)


def test_names_in_files(tmp_path: Path) -> None:
    """Experts lie one by one; MTP modules are the layers after the last, not a literal 61."""
    write_model(tmp_path / "model", FAMILIES["deepseek_v3-mtp-copies"])
    names = set(load_file(tmp_path / "model" / "model.safetensors"))
    assert {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.mlp.experts.11.down_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.2.enorm.weight",
        "model.layers.2.hnorm.weight",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.embed_tokens.weight",
        "model.layers.2.shared_head.norm.weight",
        "model.layers.2.shared_head.head.weight",
        "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.2.mlp.experts.0.up_proj.weight",
    } <= names
    assert not any("mtp" in name or "block" in name for name in names)


def test_fp8_in_files(tmp_path: Path) -> None:
    """Scales sit on a ceil grid: a 23 x 21 weight in 8 x 5 blocks has 3 x 5 of them."""
    write_model(tmp_path / "model", FAMILIES["deepseek_v3-fp8"])
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    prefix = "model.layers.1.self_attn.o_proj.weight"
    assert tensors[prefix].shape == (23, 21) and tensors[prefix].dtype == torch.float8_e4m3fn
    assert tensors[f"{prefix}_scale_inv"].shape == (3, 5)
    assert tensors["model.layers.1.mlp.experts.3.up_proj.weight_scale_inv"].shape == (1, 5)
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [8, 5]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "llama-tied", "qwen2", "qwen3"])
def test_what_transformers_saves_loads(tmp_path: Path, family: str) -> None:
    """Names and layout are the reference's: it reads ours whole, we read what it writes."""
    from transformers import AutoModelForCausalLM

    # the reference refuses a hidden size that is no multiple of the heads
    model = write_model(tmp_path / "ours", replace(FAMILIES[family], hidden_size=24))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True
    )
    theirs, report = loaded
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(tmp_path / "theirs").model.state_dict()
    for name, value in model.state_dict().items():
        # it keeps the whole gate in fp32
        assert torch.equal(again[name].double(), value.double()), name
