"""Dense models as mixtures of experts: the same function, other parameters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.cli.main import app
from lowlat.config.model import ModelConfig
from lowlat.config.parameter_count import count_parameters
from lowlat.convert.options import CompressionOptions
from lowlat.convert.parameters.upcycle import upcycled_config
from lowlat.convert.run import convert
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests import fakes

from .test_compressed_folders import LENGTH, source_model
from .test_compressed_folders import logits as logits_of

EXPERTS = 5


def dense(folder: Path, **changes: Any) -> Path:
    """A GQA model with an inner width that no block divides."""
    return source_model(folder, **({"intermediate_size": 154} | changes))


def logits(folder: Path, ids: Tensor) -> tuple[Tensor, ModelConfig]:
    loaded = load_model(folder, dtype="fp32")
    return logits_of(loaded.config, loaded.model, ids), loaded.config


def compression(tmp_path: Path) -> CompressionOptions:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i * i * 7 % 90) for i in range(LENGTH * 1200)))
    return CompressionOptions(share=0.5, layout="free", calibrate=(text,))


@pytest.mark.slow
@pytest.mark.parametrize("is_free", [False, True])
def test_experts_compute_what_the_dense_layer_does(tmp_path: Path, is_free: bool) -> None:
    src = dense(tmp_path / "src")
    given = {"to": "mla", "compression": compression(tmp_path) if is_free else None}
    convert(src, tmp_path / "dense", **given)
    report = convert(src, tmp_path / "experts", **given, experts=EXPERTS)
    convert(tmp_path / "dense", tmp_path / "later", experts=EXPERTS)
    ids = torch.arange(LENGTH) * 7 % 250
    wanted, config = logits(tmp_path / "dense", ids)
    for name in ("experts", "later"):
        found, own = logits(tmp_path / name, ids)
        assert own == upcycled_config(config, EXPERTS)
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    for file in ("config.json", "model.safetensors"):
        made = [(tmp_path / name / file).read_bytes() for name in ("experts", "later")]
        assert made[0] == made[1]
    assert report.parameters_after == count_parameters(upcycled_config(config, EXPERTS)).total


def test_transformers_loads_it_and_computes_the_same(tmp_path: Path) -> None:
    src = dense(tmp_path / "src")
    convert(src, tmp_path / "experts", to="mla", experts=EXPERTS)
    ids = torch.arange(23) * 11 % 250
    peer = AutoModelForCausalLM.from_pretrained(
        tmp_path / "experts",
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    with torch.inference_mode():
        found = peer(ids[None]).logits[0]
    wanted, _ = logits(src, ids)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_routers_differ_by_layer_and_are_the_same_every_time(tmp_path: Path) -> None:
    src = dense(tmp_path / "src")
    for name in ("a", "b"):
        convert(src, tmp_path / name, to="mla", experts=EXPERTS)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    routers = [tensor for name, tensor in a.items() if name.endswith("mlp.gate.weight")]
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    assert len(routers) > 1 and not torch.equal(routers[0], routers[1])
    deviation = json.loads((tmp_path / "a/config.json").read_text())["initializer_range"]
    assert torch.cat(routers).std().item() == pytest.approx(deviation, rel=0.1)
    biases = [tensor for name, tensor in a.items() if name.endswith("e_score_correction_bias")]
    assert all(bias.dtype == torch.float32 and not bias.any() for bias in biases)


@pytest.mark.parametrize("dtype", ["bf16", "fp8", "int8", "int4"])
def test_experts_are_stored_in_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Without calibration text: experts that see other tokens are rounded otherwise."""
    monkeypatch.setattr("lowlat.convert.run._quantization_text", lambda conversion: None)
    src = dense(tmp_path / "src")
    convert(src, tmp_path / "dense", to="mla")
    convert(src, tmp_path / "experts", to="mla", dtype=dtype, experts=EXPERTS)
    convert(tmp_path / "experts", tmp_path / "plain", dtype="fp32")
    dense_layers, experts = (
        load_file(tmp_path / name / "model.safetensors") for name in ("dense", "plain")
    )
    prefix = "model.layers.1.mlp"
    whole = dense_layers[f"{prefix}.up_proj.weight"]
    found = [experts[f"{prefix}.experts.{i}.up_proj.weight"] for i in range(EXPERTS)]
    joined = torch.cat([experts[f"{prefix}.shared_experts.up_proj.weight"], found[0]])
    steps = {"bf16": 2**-8, "fp8": 2**-4, "int8": 2**-7, "int4": 2**-3}
    assert (joined - whole).abs().max() <= steps[dtype] * whole.abs().max()
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_packed_experts_compute_what_packed_dense_layers_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Half of the inner width is whole groups, so both round the same numbers together, if no
    calibration text makes experts differ.
    """
    monkeypatch.setattr("lowlat.convert.run._quantization_text", lambda conversion: None)
    src = dense(tmp_path / "src", intermediate_size=128)
    convert(src, tmp_path / "dense", to="mla", dtype=dtype)
    convert(src, tmp_path / "experts", to="mla", dtype=dtype, experts=EXPERTS)
    ids = torch.arange(LENGTH) * 7 % 250
    (wanted, _), (found, _) = (logits(tmp_path / name, ids) for name in ("dense", "experts"))
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)


def test_a_deepseek_model_with_mtp_modules(tmp_path: Path) -> None:
    """Whose latents have norms; `--to mla` has nothing to do with it."""
    config = fakes.mla_config(intermediate_size=30)
    model = Transformer(config, dtype=torch.float32)
    init_weights(model, seed=3)
    save_model(model, config, tmp_path / "dense", source=None)
    convert(tmp_path / "dense", tmp_path / "experts", experts=EXPERTS)
    ids = torch.arange(LENGTH) * 7 % 250
    (wanted, _), (found, own) = (logits(tmp_path / name, ids) for name in ("dense", "experts"))
    assert own == upcycled_config(config, EXPERTS)
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0)
    names = load_file(tmp_path / "experts/model.safetensors")
    assert f"model.layers.{config.num_hidden_layers}.mlp.experts.0.up_proj.weight" in names


def test_the_command_says_what_was_made(tmp_path: Path) -> None:
    src = dense(tmp_path / "src")
    command = ["convert", str(src), str(tmp_path / "dst"), "--to", "mla", "--experts", "8"]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "8 routed, 2 active per token, 1 shared" in done.output


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experts": 2, "to": "mla"}, r"^--experts 2 is out of range: .* give 3 to 1024$"),
        ({"experts": -1, "to": "mla"}, r"^--experts -1 is out of range: .* give 3 to 1024$"),
        ({"experts": 1025, "to": "mla"}, r"^--experts 1025 is out of range: .* 3 to 1024$"),
        ({"experts": 4}, r"^--experts makes .*; add --to mla$"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    src = dense(tmp_path / "src")
    with pytest.raises(UserError, match=message):
        convert(src, tmp_path / "dst", **given)
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 155}, "intermediate_size 155 is odd"),
        ({"model_type": "deepseek_v2"}, "'deepseek_v2' routes by other rules"),
    ],
)
def test_models_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    config = replace(fakes.mla_config(intermediate_size=30), **changes)
    with pytest.raises(UserError, match=message):
        upcycled_config(config, 4)


def test_models_with_experts_are_refused() -> None:
    config = upcycled_config(fakes.mla_config(intermediate_size=30), 4)
    with pytest.raises(UserError, match="this one has 4 already"):
        upcycled_config(config, 4)
