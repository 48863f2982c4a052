"""Weights of compressed-tensors, AWQ, GPTQ, fbgemm and MXFP4 files: exact values, bad input."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lowlat.checkpoint.hf_folder import open_checkpoint
from lowlat.checkpoint.load import load_model
from lowlat.config.hf.vendor_quantization import Scheme, vendor_quantization
from lowlat.config.model import GQAConfig, MLAConfig, ModelConfig
from lowlat.convert.run import convert
from lowlat.model.linear import Linear
from lowlat.ops import int4_blocks, native
from lowlat.utils.errors import UserError
from lowlat.utils.json_fields import JsonFields

from .builders import assert_refused, edit_config, gqa, mla, rewrite, write_model
from .vendor_files import FORMATS, e2m1, float8, gptq, int4, mxfp4_blocks, quantize_folder


def latent_config(family: str = "deepseek_v3") -> ModelConfig:
    """MLA and experts whose rows are whole groups of 128."""
    base = mla(family)
    attention = MLAConfig(
        num_attention_heads=4,
        kv_lora_rank=128,
        q_lora_rank=128,
        qk_nope_head_dim=32,
        qk_rope_head_dim=8,
        v_head_dim=32,
    )
    assert base.moe is not None
    moe = replace(base.moe, moe_intermediate_size=128, n_routed_experts=4, n_shared_experts=1)
    return replace(base, attention=attention, moe=moe, hidden_size=128, intermediate_size=256)


def grouped_config() -> ModelConfig:
    attention = GQAConfig(num_attention_heads=8, num_key_value_heads=2, head_dim=16)
    return replace(gqa("llama"), attention=attention, hidden_size=128, intermediate_size=256)


@pytest.mark.parametrize("own", FORMATS)
def test_values_are_those_of_the_oracle(tmp_path: Path, own: str) -> None:
    """Whole matrices, rows of them, and the reference implementation of the blocks."""
    exact = quantize_folder(tmp_path / "m", grouped_config(), FORMATS[own])
    source = open_checkpoint(tmp_path / "m")
    assert "quantization_config" not in source.hf_config
    assert set(source.names()) == set(exact)
    for name, wanted in exact.items():
        assert torch.equal(source.read(name).float(), wanted), name
        assert torch.equal(source.rows(name, 3, 21).float(), wanted[3:21]), name
        match source.tensors[name].quantized():
            case (blocks,) if blocks.kind in int4_blocks.SIZES:
                found = int4_blocks.dequantize_int4(blocks.rows(), blocks.kind)
                assert torch.equal(found, wanted), name
    model = load_model(tmp_path / "m", dtype="bf16").model
    for name, value in model.state_dict().items():
        stored = name if name.startswith("lm_head") else f"model.{name}"
        assert torch.equal(value, exact[stored].bfloat16()), name


@pytest.mark.parametrize("own", ["int4", "awq", "fp8-channel", "mxfp4"])
def test_experts_and_latents(tmp_path: Path, own: str) -> None:
    exact = quantize_folder(tmp_path / "m", latent_config("kimi_k2"), FORMATS[own])
    for name, value in load_model(tmp_path / "m", dtype="fp32").model.state_dict().items():
        stored = name if name.startswith("lm_head") else f"model.{name}"
        assert torch.equal(value.float(), exact[stored]), name


@pytest.mark.parametrize("family", ["deepseek_v3", "kimi_k2"])
def test_blocks_of_fp8_become_deepseek_s(tmp_path: Path, family: str) -> None:
    """The scales of compressed-tensors' blocks have another name; the storage is the same."""
    own = float8("block", block_structure=[128, 128])
    exact = quantize_folder(tmp_path / "m", latent_config(family), own)
    loaded = load_model(tmp_path / "m")
    assert loaded.config.quantization is not None
    for name, module in loaded.model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            assert module.storage == "fp8", name
            wanted = exact[f"model.{name}.weight"]
            assert torch.equal(module.dense_weight(torch.float32), wanted), name


def test_static_scales_of_activations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """bf16 activations do not need them; a warning says so."""
    exact = quantize_folder(tmp_path / "m", grouped_config(), FORMATS["fp8-tensor"])

    def add_scales(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name.replace("weight", "input_scale")] = torch.ones(1)

    rewrite(tmp_path / "m", add_scales)
    inputs = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    table = edited("fp8-tensor", *G, "input_activations", value=inputs)
    edit_config(tmp_path / "m", quantization_config=table)
    for name, value in load_model(tmp_path / "m", dtype="fp32").model.state_dict().items():
        stored = name if name.startswith("lm_head") else f"model.{name}"
        assert torch.equal(value.float(), exact[stored]), name
    assert "their stored fp8 scales are unused" in caplog.text


def test_stacked_experts(tmp_path: Path) -> None:
    """gpt-oss's layout: two tensors for all experts of a layer, the gates' rows first."""
    model, wanted = write_model(tmp_path / "m", latent_config()), dict[str, torch.Tensor]()

    def stack(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(1, model.config.num_hidden_layers):
            prefix = f"model.layers.{layer}.mlp.experts."
            for stacked, projections in STACKED.items():
                parts = [
                    torch.cat([tensors.pop(f"{prefix}{n}.{one}.weight") for one in projections])
                    for n in range(4)
                ]
                blocks, scales, exact = e2m1(torch.stack(parts).float())
                tensors[f"{prefix}{stacked}_blocks"] = blocks
                tensors[f"{prefix}{stacked}_scales"] = scales
                for n, both in enumerate(exact):
                    for one, matrix in zip(projections, both.chunk(len(projections)), strict=True):
                        wanted[f"layers.{layer}.mlp.experts.{n}.{one}.weight"] = matrix

    rewrite(tmp_path / "m", stack)
    edit_config(tmp_path / "m", quantization_config=mxfp4_blocks().config)
    found = load_model(tmp_path / "m", dtype="fp32").model.state_dict()
    assert wanted and all(torch.equal(found[name], matrix) for name, matrix in wanted.items())


STACKED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def test_activation_order(tmp_path: Path) -> None:
    """Columns of mixed groups are dequantized exactly; kept blocks refuse them by name."""
    exact = quantize_folder(tmp_path / "m", grouped_config(), gptq(32, act_order=True))
    source = open_checkpoint(tmp_path / "m")
    assert all(torch.equal(source.read(name).float(), one) for name, one in exact.items())
    if native.available():
        read = partial(load_model, tmp_path / "m", keeps_blocks=True)
        assert_refused(read, tmp_path / "m", "g_idx': columns in activation order")


def test_the_numbers_of_a_file_come_back(tmp_path: Path) -> None:
    """Blocks lose nothing: codes, scales and zero points can be read from them again."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (5, 256), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 17, (5, 2), generator=generator, dtype=torch.uint8)
    scale = torch.randn(5, 2, generator=generator).half()
    pairs = codes[:, ::2] | codes[:, 1::2] << 4
    rows = int4_blocks.encode_int4(int4_blocks.INT4_128, pairs, scale, zero).view(5, 2, 68)
    words = rows[..., :4].contiguous().view(torch.int32)[..., 0]
    assert torch.equal((words & 255).to(torch.uint8), zero)
    assert torch.equal((words & ~255).view(torch.float32), scale.float())
    halves = rows[..., 4:].unflatten(2, (4, 16))
    assert torch.equal(torch.stack([halves & 15, halves >> 4], dim=3).flatten(1), codes)


K = "model.layers.0.self_attn.k_proj"
Tensors = dict[str, torch.Tensor]


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, change(tensors[name]).contiguous())


BROKEN: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "no scale": ("int4", drop(f"{K}.weight_scale"), f"'{K}.weight_scale' is missing"),
    "no shape": ("int4", drop(f"{K}.weight_shape"), f"'{K}.weight_shape' is missing"),
    "no zero points": ("int4-asymmetric", drop(f"{K}.weight_zero_point"), "zero_point' is missing"),
    "other shape": (
        "int4",
        put(f"{K}.weight_shape", lambda t: t + 1),
        "weight_shape' is [33, 129]",
    ),
    "short": ("int4", put(f"{K}.weight_packed", lambda t: t[:, :-4]), "weight_scale' has shape"),
    "odd columns": ("int4", put(f"{K}.weight_packed", lambda t: t[:, :-1]), "whole groups of 32"),
    "codes in int64": ("int4", put(f"{K}.weight_packed", torch.Tensor.long), "is int64, not int32"),
    "infinite scale": ("int4", put(f"{K}.weight_scale", lambda t: t / 0), "not finite"),
    "groups": ("awq", put(f"{K}.scales", lambda t: t.repeat(2, 1)), "scales' has shape [2, 32]"),
    "no qzeros": ("gptq", drop(f"{K}.qzeros"), f"'{K}.qzeros' is missing"),
    "zero point 16": ("gptq", put(f"{K}.qzeros", lambda t: t | 15), "zero points out of range"),
    "group 9": ("gptq", put(f"{K}.g_idx", lambda t: t + 9), "groups outside 0..0"),
    "rank": ("gptq", put(f"{K}.qweight", lambda t: t[0]), "is no matrix"),
    "fp8 scales": ("fp8-channel", put(f"{K}.weight_scale", lambda t: t[:5]), "has shape [5, 1]"),
    "no fp8 scale": ("fbgemm", drop(f"{K}.weight_scale"), f"'{K}.weight_scale' is missing"),
    "nan scale": ("mxfp4", put(f"{K}.weight_scale", lambda t: t * 0 + 255), "not finite"),
    "mxfp4 short": ("mxfp4", put(f"{K}.weight_scale", lambda t: t[:, 1:]), "has shape [32, 3]"),
    "mxfp4 odd": ("mxfp4", put(f"{K}.weight_packed", lambda t: t[:, 1:]), "whole groups of 32"),
    "no blocks": ("mxfp4-blocks", put(f"{K}.weight_blocks", lambda t: t[..., 0]), "MXFP4 blocks"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_malformed_tensors_are_named(tmp_path: Path, case: str) -> None:
    own, change, words = BROKEN[case]
    quantize_folder(tmp_path / "m", grouped_config(), FORMATS[own])
    rewrite(tmp_path / "m", change)
    for keeps in (False, True):
        read = partial(load_model, tmp_path / "m", dtype="auto", keeps_blocks=keeps)
        assert_refused(read, tmp_path / "m", words)


def edited(own: str, *path: str, value: Any) -> dict[str, Any]:
    """The quantization_config of a format with one value replaced."""
    config = json.loads(json.dumps(FORMATS[own].config))
    table = config
    for name in path[:-1]:
        table = table[name]
    table[path[-1]] = value
    return config


G = ("config_groups", "group_0")
W = (*G, "weights")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": (edited("int4", *W, "num_bits", value=8), "weights.num_bits 8 is not supported"),
    "act-order": (edited("int4", *W, "actorder", value="group"), "weights.actorder"),
    "strategy": (edited("int4", *W, "strategy", value="tensor"), "weights.strategy"),
    "group of 16": (edited("int4", *W, "group_size", value=16), "weights.group_size 16"),
    "unknown": (edited("int4", *W, "rotation", value=1), "weights.rotation (1) is unknown"),
    "format": (edited("int4", "format", value="marlin-24"), 'format "marlin-24" is not supported'),
    "transform": (edited("int4", "transform_config", value={"a": 1}), "transform_config"),
    "cache": (edited("int4", "kv_cache_scheme", value={"num_bits": 8}), "kv_cache_scheme"),
    "sparse": (edited("int4", "sparsity_config", value={"format": "x"}), "sparsity_config.format"),
    "outputs": (edited("int4", *G, "output_activations", value={"a": 1}), "output_activations"),
    "preset": (edited("int4", "config_groups", value={"W4A16": ["Linear"]}), "group"),
    "no groups": (edited("int4", "config_groups", value={}), "config_groups is missing"),
    "expression": (edited("int4", "ignore", value=["re:("]), "ignore has a malformed expression"),
    "ignored": (edited("int4", "ignore", value=["re:.*k_proj"]), "ignore names model.layers.0"),
    "targets": (edited("int4", *G, "targets", value=["re:.*q_proj"]), "no target matches"),
    "awq bits": (edited("awq", "bits", value=8), "quantization_config.bits 8 is not supported"),
    "gemv": (edited("awq", "version", value="gemv"), "quantization_config.version"),
    "no zeros": (edited("awq", "zero_point", value=False), "quantization_config.zero_point"),
    "marlin": (edited("gptq", "checkpoint_format", value="marlin"), "checkpoint_format"),
    "dynamic": (edited("gptq", "dynamic", value={"-:x": {}}), "quantization_config.dynamic"),
    "pack": (edited("gptq", "pack_dtype", value="int16"), "quantization_config.pack_dtype"),
    "no group": (edited("gptq", "group_size", value=None), "group_size is missing"),
    "dequantize": (edited("mxfp4-blocks", "dequantize", value=True), "dequantize"),
    "method": (edited("awq", "quant_method", value="aqlm"), 'quant_method "aqlm"'),
    "other method": (FORMATS["gptq"].config, "weight_packed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configs_that_change_the_weights_are_named(tmp_path: Path, case: str) -> None:
    config, words = REFUSED[case]
    own = "awq" if config["quant_method"] in ("awq", "aqlm") else "int4"
    own = {"fp8": "fp8", "mxfp4": "mxfp4-blocks"}.get(config["quant_method"], own)
    own = "gptq" if config["quant_method"] == "gptq" and case != "other method" else own
    quantize_folder(tmp_path / "m", grouped_config(), FORMATS[own])
    edit_config(tmp_path / "m", quantization_config=config)
    assert_refused(lambda: load_model(tmp_path / "m"), tmp_path / "m", words)


def test_a_language_part_s_targets_have_its_prefix() -> None:
    table = edited("int4", "ignore", value=["language_model.model.layers.0.mlp.gate"])
    quant = vendor_quantization(JsonFields(table, "config.json"))
    with pytest.raises(UserError, match=r"ignore names model\.layers\.0\.mlp\.gate"):
        quant.scheme_of("model.layers.0.mlp.gate")
    assert quant.scheme_of("model.layers.0.mlp.gate_proj").layout == "pack-quantized"


def test_the_config_of_kimi_k2_thinking() -> None:
    """As released: only routed experts are quantized."""
    own = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    more = {"actorder": None, "block_structure": None, "dynamic": False, "observer": "minmax"}
    group = {"weights": {**own, **more, "observer_kwargs": {}}, "targets": ["Linear"]}
    table = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {**group, "input_activations": None, "output_activations": None}
        },
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        ],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    quant = vendor_quantization(JsonFields(table, "config.json"))
    scheme = quant.scheme_of("model.layers.1.mlp.experts.0.gate_proj")
    assert scheme == Scheme(layout="pack-quantized", group_size=32)
    for plain in ("self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.down_proj"):
        with pytest.raises(UserError, match="ignore names"):
            quant.scheme_of(f"model.layers.0.{plain}")


def test_conversions_choose_a_number_type(tmp_path: Path) -> None:
    exact = quantize_folder(tmp_path / "m", grouped_config(), int4())
    with pytest.raises(UserError, match="choose the data type with --dtype"):
        convert(tmp_path / "m", tmp_path / "auto", to="mla")
    convert(tmp_path / "m", tmp_path / "wide", dtype="fp32")
    found = load_model(tmp_path / "wide").model.state_dict()
    for name, value in found.items():
        assert torch.equal(value, exact[name if name == "lm_head.weight" else f"model.{name}"]), (
            name
        )
