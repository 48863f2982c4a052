"""A whole conversion: options, data types, what is copied, and what is left when it fails."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import ModelConfig, QuantConfig
from lowlat.convert.parameters.exact_mla import mla_config
from lowlat.convert.report import describe_attention
from lowlat.convert.run import convert
from lowlat.utils.errors import UserError
from tests.configs import PLAIN_MOE
from tests.unit.checkpoint.builders import gqa, mla, random_model

from .texts import write_tokenizer

HEADS, GROUPS, HEAD_DIM = 6, 2, 10


def gqa_model(family: str = "llama", groups: int = GROUPS, **changes: Any) -> ModelConfig:
    config = gqa(family, **changes)
    return replace(config, attention=replace(config.attention, num_key_value_heads=groups))


def fp8_model() -> ModelConfig:
    """DeepSeek-V3 with experts, a router bias, an MTP module and fp8 blocks with ragged edges."""
    return mla(
        "deepseek_v3",
        moe=replace(PLAIN_MOE, n_routed_experts=4, moe_intermediate_size=5),
        num_nextn_predict_layers=1,
        quantization=QuantConfig(weight_block_size=(8, 5)),
    )


def write(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint of `config`, every number random."""
    save_model(random_model(config, dtype), config, folder, source=None)
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def raw_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_mla_folder_loads_as_the_config_says(tmp_path: Path, family: str, groups: int) -> None:
    config = gqa_model(family, groups)
    source = write(tmp_path / "source", config)
    report = convert(source, tmp_path / "mla", to="mla")
    loaded = load_model(tmp_path / "mla")
    assert loaded.config == mla_config(config)
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.bfloat16}
    assert raw_config(tmp_path / "mla")["dtype"] == "bfloat16"
    # 2 layers * 2 * groups * 10 elements * 2 bytes
    assert report.cache_bytes_per_token_before == 80 * groups
    assert report.cache_bytes_per_token_after == 80 * groups
    assert report.parameters_after == sum(p.numel() for p in loaded.model.parameters())
    assert (
        report.attention_after == f"MLA, 6 heads, latent {10 * groups} + rotary key {10 * groups}"
    )


def test_tied_embedding_stays_tied(tmp_path: Path) -> None:
    source = write(tmp_path / "source", gqa_model(tie_word_embeddings=True))
    convert(source, tmp_path / "mla", to="mla")
    assert "lm_head.weight" not in load_file(tmp_path / "mla" / "model.safetensors")
    assert raw_config(tmp_path / "mla")["tie_word_embeddings"] is True


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("to", [None, "mla"])
def test_dtype_is_that_of_every_tensor_and_of_the_config(
    tmp_path: Path, dtype: str, to: str | None
) -> None:
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    source = write(tmp_path / "source", gqa_model(), torch.float32)
    convert(source, tmp_path / "new", to=to, dtype=dtype)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}
    assert raw_config(tmp_path / "new")["dtype"] == str(wanted).removeprefix("torch.")
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding.to(wanted))


def test_a_folder_may_have_the_name_of_a_file_in_it(tmp_path: Path) -> None:
    """Regression: config and tokenizer lost with the rest of what was taken for one file."""
    source = write(tmp_path / "m", gqa_model("llama"))
    convert(source, tmp_path / "model.safetensors", dtype="fp32")
    assert {"config.json", "model.safetensors"} <= {
        path.name for path in (tmp_path / "model.safetensors").iterdir()
    }


def test_the_ending_of_a_gguf_file_in_capitals(tmp_path: Path) -> None:
    source = write(tmp_path / "m", gqa_model("llama"))
    convert(source, tmp_path / "new.GGUF")
    assert (tmp_path / "new.GGUF").is_file()
    convert(tmp_path / "new.GGUF", tmp_path / "back", dtype="fp32")
    (tmp_path / "back").rename(tmp_path / "back.gguf")
    convert(tmp_path / "back.gguf", tmp_path / "again", dtype="bf16")


def test_a_name_no_file_can_have(tmp_path: Path) -> None:
    source = write(tmp_path / "m", gqa_model("llama"))
    with pytest.raises(UserError, match=r"cannot be written .*; choose another destination"):
        convert(source, tmp_path / ("x" * 250), dtype="fp32")


def test_resave_keeps_names_and_config_fields(tmp_path: Path) -> None:
    """Attention is not touched without --to, QK-norm and windows included."""
    for family, changes in (("qwen3", {}), ("mistral", {"sliding_window": 7})):
        source = write(tmp_path / family, gqa_model(family, **changes))
        convert(source, tmp_path / f"{family}-fp32", dtype="fp32")
        before = load_file(source / "model.safetensors")
        after = load_file(tmp_path / f"{family}-fp32" / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name].float()) for name in before)
        changed = {"dtype": "float32"}
        assert raw_config(tmp_path / f"{family}-fp32") == raw_config(source) | changed


def test_a_converted_model_can_be_narrowed(tmp_path: Path) -> None:
    """The constants in files are exact in every type, so the loader still knows them."""
    source = write(tmp_path / "source", gqa_model("qwen2"), torch.float32)
    convert(source, tmp_path / "mla", to="mla")
    for dtype in ("bf16", "fp16"):
        convert(tmp_path / "mla", tmp_path / dtype, dtype=dtype)
        wanted = load_model(tmp_path / "mla", dtype=dtype).model.state_dict()
        found = load_model(tmp_path / dtype).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_fp8_blocks_become_bf16_and_the_router_bias_stays_fp32(tmp_path: Path) -> None:
    """Loaded as bf16, the fp8 source and the folder written from it are the same model."""
    source = write(tmp_path / "source", fp8_model())
    convert(source, tmp_path / "bf16", dtype="bf16")
    raw = raw_config(tmp_path / "bf16")
    assert "quantization_config" not in raw and raw["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "bf16" / "model.safetensors")
    assert not any(name.endswith("_scale_inv") for name in tensors)
    wanted = load_model(source, dtype="bf16").model.state_dict()
    found = load_model(tmp_path / "bf16").model.state_dict()
    assert wanted.keys() == found.keys()
    for name, tensor in found.items():
        is_bias = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16), name
        assert torch.equal(tensor, wanted[name]), name


def test_tokenizer_and_generation_files_are_copied(tmp_path: Path) -> None:
    source = write(tmp_path / "source", gqa_model())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        (source / name).write_text(f"{{}} {name}")
    (source / "notes.txt").write_text("not part of the model")
    convert(source, tmp_path / "mla", to="mla")
    names = {path.name for path in (tmp_path / "mla").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
    }
    assert (tmp_path / "mla" / "tokenizer.json").read_text() == "{} tokenizer.json"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to convert; give --to mla"),
        ({"to": "gqa"}, "--to 'gqa' is unknown"),
        ({"dtype": "int3"}, "--dtype 'int3' is unknown"),
        ({"dtype": "fp64"}, "--dtype 'fp64' is unknown"),
        ({"file_format": "onnx"}, "--format 'onnx' is unknown"),
        ({"file_format": "gguf"}, "new: --format gguf needs a file name that ends in .gguf"),
    ],
)
def test_options_that_cannot_be_served(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "unread", tmp_path / "new", **options)


def test_unfit_models_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    configs = {
        r"config.json: model_type 'qwen3' .*QK-norm": gqa_model("qwen3"),
        "config.json: sliding_window 7": gqa_model("mistral", sliding_window=7),
        "already has": mla_config(gqa_model()),
    }
    for number, (message, config) in enumerate(configs.items()):
        source = write(tmp_path / f"source{number}", config)
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "new", to="mla")
        assert [path.name for path in tmp_path.iterdir() if "new" in path.name] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), "k_proj.weight' is missing"),
        (lambda t: t.update({"model.odd": torch.ones(3)}), "model.odd.* has no place"),
        (
            lambda t: t.update({"model.layers.0.self_attn.v_proj.weight": torch.ones(3, 23)}),
            r"v_proj.weight.* has shape \[3, 23\], but .* asks for \[20, 23\]",
        ),
    ],
    ids=["missing", "leftover", "shape"],
)
def test_damaged_sources_name_the_tensor(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    source = write(tmp_path / "source", gqa_model())
    edit_tensors(source, change)
    for options in ({"to": "mla"}, {"dtype": "fp32"}):
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / "new", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    """Regression: weights that silently become infinite."""
    source = write(tmp_path / "source", gqa_model())
    edit_tensors(source, lambda t: t["model.layers.1.self_attn.k_proj.weight"].fill_(1e6))
    with pytest.raises(UserError, match=r"k_proj.weight.*beyond the range of fp16"):
        convert(source, tmp_path / "new", to="mla", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_existing_destination_is_left_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "source", gqa_model())
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine").write_text("kept")
    with pytest.raises(UserError, match="exists already"):
        convert(source, tmp_path / "new", to="mla")
    with pytest.raises(UserError, match="exists already"):
        convert(source, source, to="mla")
    assert (tmp_path / "new" / "mine").read_text() == "kept"
    load_model(source)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        (6, "MHA, 6 heads of 10"),
        (2, "GQA, 6 heads in 2 groups of 10"),
        (1, "MQA, 6 heads sharing one key and value of 10"),
    ],
)
def test_attention_in_words(groups: int, words: str) -> None:
    assert describe_attention(gqa_model(groups=groups).attention) == words


def test_no_usable_tokenizer_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Models with tiktoken.model alone are converted, file included, with what makes the rest."""
    source = write(tmp_path / "source", gqa_model())
    (source / "tiktoken.model").write_text("YQ== 0")
    convert(source, tmp_path / "new", dtype="fp16")
    assert (tmp_path / "new" / "tiktoken.model").read_text() == "YQ== 0"
    assert "new: has no usable tokenizer" in caplog.text
    assert "convert_tiktoken_to_fast(" in caplog.text
    caplog.clear()
    write_tokenizer(source)
    convert(source, tmp_path / "usable", dtype="fp16")
    assert "tokenizer" not in caplog.text
