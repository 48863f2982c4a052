"""Every data type to every other, for every family: the folder written is the model that loading
the source in that type gives.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.mapping import file_name
from lowlat.checkpoint.shard_layout import plan_shards
from lowlat.convert.run import convert
from lowlat.model.linear import Linear
from lowlat.model.transformer import Transformer
from lowlat.ops.fp8 import quantize_blocks
from lowlat.utils.errors import UserError
from tests.unit.checkpoint.builders import FAMILIES, assert_same_bits, bits, rewrite, write_model

TYPES = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
SIXTEEN = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def raw_config(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_written_as_loaded(tmp_path: Path, family: str, dtype: str) -> None:
    """fp8 sources, padded latents, MTP copies and tied heads included, to the bit."""
    write_model(tmp_path / "m", FAMILIES[family])
    convert(tmp_path / "m", tmp_path / "new", dtype=dtype)
    expected = load_model(tmp_path / "m", dtype=dtype).model
    found = load_model(tmp_path / "new").model
    if dtype in ("int8", "int4"):
        assert_better_scales(found, expected, load_model(tmp_path / "m", dtype="fp32").model)
    else:
        assert_same_bits(found, expected)


@torch.no_grad()
def assert_better_scales(found: Transformer, expected: Transformer, exact: Transformer) -> None:
    """Projections are closer to `exact` than those of `expected`, quantized by min-max; everything
    else is the same.
    """
    if exact.lm_head is None:
        exact.add_head()
        assert exact.lm_head is not None
        exact.lm_head.weight = exact.embed_tokens.weight
    sums = [0.0, 0.0]
    for name, module in expected.named_modules():
        if isinstance(module, Linear) and module.storage != "plain":
            own, target = found.get_submodule(name), exact.get_submodule(name)
            assert isinstance(own, Linear) and isinstance(target, Linear)
            dense = target.dense_weight(torch.float32)
            for place, each in enumerate((own, module)):
                error = each.dense_weight(torch.float32) - dense
                sums[place] += float(error.square().sum(dtype=torch.float64))
                each.requires_grad_(False)
                for key, parameter in each.named_parameters():
                    if key != "bias":
                        parameter.zero_()
    assert sums[0] < sums[1]
    assert_same_bits(found, expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if not name.endswith("fp8")])
def test_fp8_as_released(tmp_path: Path, family: str) -> None:
    """Blocks of 128 where released checkpoints have them, from the exact values; else bf16."""
    write_model(tmp_path / "m", FAMILIES[family])
    convert(tmp_path / "m", tmp_path / "fp8", dtype="fp8")
    exact = load_model(tmp_path / "m", dtype="fp32").model
    stored = load_model(tmp_path / "fp8")
    padded = family.endswith("converted")
    plain = {"lm_head", "head", "eh_proj"}
    for name, module in stored.model.named_modules():
        if not isinstance(module, Linear):
            continue
        dense = exact.get_submodule(name)
        assert isinstance(dense, Linear)
        is_plain = name.rpartition(".")[2] in plain or (padded and "self_attn" in name)
        assert module.storage == ("plain" if is_plain else "fp8"), name
        if is_plain:
            assert torch.equal(module.weight, dense.weight.bfloat16()), name
        else:
            weight, scale = quantize_blocks(dense.weight, (128, 128))
            assert torch.equal(bits(module.weight), bits(weight)), name
            assert module.weight_scale_inv is not None
            assert torch.equal(module.weight_scale_inv, scale), name
    released = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    written = raw_config(tmp_path / "fp8")["quantization_config"]
    assert isinstance(written, dict)
    kept = written.pop("modules_to_not_convert", [])
    assert written == released
    assert bool(kept) == padded and all(".self_attn" in name for name in kept)


@pytest.mark.slow
@pytest.mark.parametrize("first", TYPES)
@pytest.mark.parametrize("second", TYPES)
def test_every_pair(tmp_path: Path, first: str, second: str) -> None:
    """A type from another is that type of the other's values; the same type twice is refused."""
    write_model(tmp_path / "m", FAMILIES["deepseek_v3-mtp"])
    convert(tmp_path / "m", tmp_path / "first", dtype=first)
    if first == second and first not in SIXTEEN:
        with pytest.raises(UserError, match=f"nothing to convert; its weights are {first} already"):
            convert(tmp_path / "first", tmp_path / "second", dtype=second)
        return
    convert(tmp_path / "first", tmp_path / "second", dtype=second)
    found = load_model(tmp_path / "second")
    if second == "fp8":
        exact = load_model(tmp_path / "first", dtype="fp32").model
        weight = exact.get_submodule("layers.1.mlp.experts.3.up_proj").weight
        assert isinstance(weight, torch.Tensor)
        own = found.model.get_submodule("layers.1.mlp.experts.3.up_proj").weight
        assert isinstance(own, torch.Tensor)
        assert torch.equal(bits(own), bits(quantize_blocks(weight, (128, 128))[0]))
    elif second == "bf16":  # in which loading leaves packed weights packed
        exact = load_model(tmp_path / "first", dtype="fp32").model.state_dict()
        for name, value in found.model.state_dict().items():
            expected = exact[name] if value.dtype == torch.float32 else exact[name].bfloat16()
            assert torch.equal(value, expected), name
    elif second in ("int8", "int4"):
        expected = load_model(tmp_path / "first", dtype=second).model
        exact = load_model(tmp_path / "first", dtype="fp32").model
        assert_better_scales(found.model, expected, exact)
    else:
        assert_same_bits(found.model, load_model(tmp_path / "first", dtype=second).model)


@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8"])
def test_fp8_of_which_the_config_says_nothing(tmp_path: Path, dtype: str) -> None:
    """Refused as in loading; regression: bits of fp8 numbers taken for values."""
    name = "model.layers.0.mlp.up_proj.weight"
    write_model(tmp_path / "m", FAMILIES["llama"])
    rewrite(tmp_path / "m", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    options = {"to": "mla"} if dtype == "auto" else {}
    with pytest.raises(
        UserError, match=r"no quantization_config that defines .*; take config.json"
    ):
        convert(tmp_path / "m", tmp_path / "new", dtype=dtype, **options)


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4", "bf16"])
def test_router_biases_stay_fp32(tmp_path: Path, dtype: str) -> None:
    """MTP modules' included, through a type and back."""
    write_model(tmp_path / "m", FAMILIES["deepseek_v3-mtp"])
    convert(tmp_path / "m", tmp_path / "there", dtype=dtype)
    convert(tmp_path / "there", tmp_path / "back", dtype="fp32")
    before, after = (load_model(tmp_path / name).model.state_dict() for name in ("m", "back"))
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3  # one expert layer, two MTP modules
    assert all(torch.equal(bits(before[name]), bits(after[name])) for name in biases)


def test_exact_mla_in_a_packed_type(tmp_path: Path) -> None:
    """--to mla with --dtype, at once and one after the other; a packed source stays packed."""
    write_model(tmp_path / "m", FAMILIES["qwen2"])
    convert(tmp_path / "m", tmp_path / "mla", to="mla")
    convert(tmp_path / "mla", tmp_path / "two", dtype="int4")
    convert(tmp_path / "m", tmp_path / "one", to="mla", dtype="int4")
    one = load_model(tmp_path / "one")
    assert_same_bits(one.model, load_model(tmp_path / "two").model)
    assert one.config.packing == "int4"
    convert(tmp_path / "m", tmp_path / "packed", dtype="int8")
    convert(tmp_path / "packed", tmp_path / "packed-mla", to="mla")
    assert load_model(tmp_path / "packed-mla").config.packing == "int8"


@pytest.mark.parametrize("dtype", ["fp8", "int8", "int4"])
def test_values_that_do_not_fit_are_refused(tmp_path: Path, dtype: str) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite(tmp_path / "m", lambda tensors: tensors[name][3].fill_(torch.nan))
    with pytest.raises(UserError, match=f"'{name}' has values that are not finite"):
        convert(tmp_path / "m", tmp_path / "new", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_shards_and_headers_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard ends before the group of tensors that would overflow it."""
    model = write_model(tmp_path / "m", FAMILIES["deepseek_v3"])
    small = partial(plan_shards, max_shard_bytes=5000)
    monkeypatch.setattr("lowlat.convert.run.plan_shards", small)
    convert(tmp_path / "m", tmp_path / "new", dtype="fp32")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    found: dict[str, torch.Tensor] = {}
    for shard in shards:
        with safe_open(tmp_path / "new" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == shard for name in file.keys())
        own = load_file(tmp_path / "new" / shard)
        assert len(own) == 1 or sum(tensor.nbytes for tensor in own.values()) <= 5000
        found |= own
    check_values(model, found)


def check_values(model: Transformer, found: dict[str, torch.Tensor]) -> None:
    config = model.config
    for name, value in model.state_dict().items():
        assert torch.equal(found[file_name(config, name)], value.float()), name


def test_report_says_sizes(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["llama"])
    report = convert(tmp_path / "m", tmp_path / "new", dtype="fp32")
    size = (tmp_path / "new" / "model.safetensors").stat().st_size
    assert report.weight_bytes_after == size
    assert report.weight_bytes_before == (tmp_path / "m" / "model.safetensors").stat().st_size
    # headers count, so a tiny model has a little more than 32 and 16
    assert 32 < report.bits_per_weight_after < 40
    assert 16 < report.bits_per_weight_before < 24
