"""Quantized experts of mistral4: one by one as compressed-tensors, AWQ and others write them, and
stacked in fp8 as transformers and the released checkpoint have them.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from lowlat.checkpoint.load import load_model
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import ModelConfig
from lowlat.model.linear import Linear
from lowlat.ops import native

from .builders import assert_refused, edit_config, rewrite, write_model
from .test_vendors import latent_config
from .vendor_files import FORMATS, quantize_folder

Tensors = dict[str, Tensor]
EXPERTS = "model.layers.1.mlp.experts."


def mistral4() -> ModelConfig:
    base = latent_config()
    assert base.moe is not None
    moe = replace(base.moe, scoring_func="softmax", router_bias=False, n_group=1, topk_group=1)
    return replace(base, model_type="mistral4", moe=moe)


@pytest.mark.parametrize("own", ["int4", "int4-asymmetric", "awq", "gptq", "fp8-channel", "mxfp4"])
def test_experts_one_by_one(tmp_path: Path, own: str) -> None:
    exact = quantize_folder(tmp_path / "m", latent_config("kimi_k2"), FORMATS[own])

    def without_bias(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            del tensors[name]

    rewrite(tmp_path / "m", without_bias)
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    kept = {"quantization_config": raw["quantization_config"]}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config_to_hf(mistral4()) | kept))
    for name, value in load_model(tmp_path / "m", dtype="fp32").model.state_dict().items():
        stored = name if name.startswith("lm_head") else f"model.{name}"
        assert torch.equal(value.float(), exact[stored]), name
    if native.available():
        model = load_model(tmp_path / "m", keeps_blocks=True).model
        expert = model.get_submodule("layers.1.mlp.experts.3.down_proj")
        assert isinstance(expert, Linear) and expert.storage != "plain"


def fp8(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """[..., out, in] with a scale for each of rows x columns blocks, and what transformers makes of
    it."""
    grid = weight.float().unflatten(-1, (columns, -1)).unflatten(-3, (rows, -1))
    scale = grid.abs().amax(dim=(-3, -1)) / 448
    stored = (grid / scale[..., :, None, :, None]).to(torch.float8_e4m3fn)
    values = stored.flatten(-4, -3).flatten(-2)
    dequantize = Fp8Dequantize(None)._dequantize_one
    return values, scale, dequantize(values, scale, torch.float32)


def quantize(tensors: Tensors, wanted: Tensors, blocks: Callable[[str, Tensor], Any]) -> None:
    """Stacked experts and plain projections in fp8; the exact weights by parameter."""
    for name, weight in list(tensors.items()):
        is_stacked = weight.dim() == 3
        if not is_stacked and not name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")):
            continue
        if is_stacked or blocks(name, weight) is not None:
            tensors[name], scale, exact = fp8(weight * 0.1, *blocks(name, weight))
            tensors[f"{name}_scale_inv"] = scale
            parameter = name.removeprefix("model.")
            if not is_stacked:
                wanted[parameter] = exact
                continue
            prefix, _, projection = parameter.rpartition(".")
            halves = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
            for expert, matrix in enumerate(exact):
                for half, one in zip(halves, matrix.chunk(len(halves)), strict=True):
                    wanted[f"{prefix}.{expert}.{half}.weight"] = one


@pytest.mark.parametrize(
    ("halves", "unused"), [(1, "activation_scale"), (2, "activation_scale"), (1, "input_scale")]
)
def test_stacked_in_fp8_with_a_scale_per_matrix(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, halves: int, unused: str
) -> None:
    """The released form: static scales of activations, which bf16 activations do not need."""
    wanted: Tensors = {}
    write_model(tmp_path / "m", mistral4())

    def blocks(name: str, _: Tensor) -> Any:
        return (halves if name.endswith("gate_up_proj") else 1, 1)

    def change(tensors: Tensors) -> None:
        quantize(tensors, wanted, blocks)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.replace("scale_inv", unused)] = torch.ones(1)

    rewrite(tmp_path / "m", change)
    config = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    edit_config(tmp_path / "m", quantization_config=config)
    found = load_model(tmp_path / "m", dtype="fp32").model.state_dict()
    assert "their stored fp8 scales are unused" in caplog.text
    assert len(wanted) > 20
    assert all(torch.equal(found[name], matrix) for name, matrix in wanted.items())
    if native.available():
        kept = load_model(tmp_path / "m", keeps_blocks=True).model
        for name, module in kept.named_modules():
            if isinstance(module, Linear) and name != "lm_head":
                dense = module.dense_weight(torch.float32)
                assert torch.equal(dense, wanted[f"{name}.weight"]), name


def test_stacked_in_blocks_of_fp8(tmp_path: Path) -> None:
    """weight_block_size, as transformers writes it."""
    wanted: Tensors = {}
    write_model(tmp_path / "m", mistral4())
    size = 32

    def blocks(_: str, weight: Tensor) -> Any:
        fits = all(extent % size == 0 for extent in weight.shape[-2:])
        return tuple(extent // size for extent in weight.shape[-2:]) if fits else None

    rewrite(tmp_path / "m", partial(quantize, wanted=wanted, blocks=blocks))
    config = {
        "quant_method": "fp8",
        "weight_block_size": [size, size],
        "modules_to_not_convert": ["kv_a_proj_with_mqa", "q_b_proj", "lm_head"],
    }
    edit_config(tmp_path / "m", quantization_config=config)
    found = load_model(tmp_path / "m", dtype="fp32").model.state_dict()
    assert len(wanted) > 20
    assert all(torch.equal(found[name], matrix) for name, matrix in wanted.items())


def without_scale(tensors: Tensors) -> None:
    del tensors[f"{EXPERTS}gate_up_proj_scale_inv"]


def flat_scale(tensors: Tensors) -> None:
    name = f"{EXPERTS}gate_up_proj_scale_inv"
    tensors[name] = tensors[name].flatten()


def odd_rows(tensors: Tensors) -> None:
    name = f"{EXPERTS}gate_up_proj"
    tensors[name] = tensors[name].view(torch.uint8)[:, 1:].clone().view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_scale, "gate_up_proj_scale_inv' is missing"),
        (flat_scale, "has shape [4], not [4, rows, columns]"),
        (odd_rows, "has 255 rows, which are not two equal halves"),
    ],
)
def test_malformed_stacks_are_named(
    tmp_path: Path, change: Callable[[Tensors], None], words: str
) -> None:
    write_model(tmp_path / "m", mistral4())
    rewrite(tmp_path / "m", partial(quantize, wanted={}, blocks=lambda name, weight: (1, 1)))
    rewrite(tmp_path / "m", change)
    edit_config(tmp_path / "m", quantization_config={"quant_method": "fp8"})
    assert_refused(partial(load_model, tmp_path / "m"), tmp_path / "m", words)
