"""Compressed models as folders: what is written, who loads it, what is refused."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowlat.checkpoint import resumable_writer as restart
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.config.model import MLAConfig, ModelConfig
from lowlat.convert.compression.scratch import scratch_folder
from lowlat.convert.options import CompressionOptions, compression_options
from lowlat.convert.report import REPORT_FILE
from lowlat.convert.run import convert
from lowlat.model.init import init_weights
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests import configs
from tests.configs import GQA, ROPE
from tests.fakes import byte_tokenizer, gqa_config
from tests.lowlat_configs import EVERY, random_model
from tests.packed_attention import PackedAttention
from tests.parameters import slow_except
from tests.unit.convert.test_run import edit_tensors

LENGTH = 40
LLAMA3 = replace(configs.LLAMA3, original_max_position_embeddings=24)


def source_model(folder: Path, *, bias: bool = False, **changes: Any) -> Path:
    """A GQA model with a tokenizer; its text is bytes."""
    attention = replace(GQA, head_dim=16, qkv_bias=bias)
    fields = {"hidden_size": 64, "attention": attention, "max_position_embeddings": LENGTH}
    config = gqa_config(model_type="qwen2" if bias else "llama", **(fields | changes))
    model = Transformer(config, dtype=torch.float32)
    init_weights(model, seed=3)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, config, folder, source=None)
    byte_tokenizer().save(folder)
    return folder


def wanted(tmp_path: Path, **changes: Any) -> CompressionOptions:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("".join(chr(33 + i * i * 7 % 90) for i in range(LENGTH * 40)))
    return replace(CompressionOptions(share=0.5, calibrate=(text,)), **changes)


def logits(config: ModelConfig, model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    backend = PackedAttention([len(ids)])
    with torch.no_grad():
        return model.logits(model(ids, backend.positions(), backend))


@pytest.mark.parametrize("method", ["weighted", "transmla", "mha2mla"])
@pytest.mark.parametrize("bias", slow_except([True], [False, True]))
def test_other_programs_compute_the_same(tmp_path: Path, bias: bool, method: str) -> None:
    """The standard layout in transformers' DeepseekV3ForCausalLM, fp32."""
    rope = ROPE if bias else LLAMA3
    source = source_model(tmp_path / "source", bias=bias, rope=rope)
    convert(source, tmp_path / "mla", to="mla", compression=wanted(tmp_path, method=method))
    loaded = load_model(tmp_path / "mla")
    assert loaded.config.model_type == "deepseek_v3"
    assert isinstance(loaded.config.attention, MLAConfig)
    assert loaded.config.attention.entry_dim == 32
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "mla", dtype=torch.float32, experts_implementation="eager"
    )
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    ids = torch.randint(263, (LENGTH,), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids[None]).logits[0].detach()
    found = logits(loaded.config, loaded.model, ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["standard", "free"])
@pytest.mark.parametrize("dtype", ["auto", "bf16", "int8"])
def test_what_is_written(tmp_path: Path, layout: str, dtype: str) -> None:
    """The folder loads, has half the cache, and says what it cost."""
    source = source_model(tmp_path / "source")
    compression = wanted(tmp_path, layout=layout)
    report = convert(source, tmp_path / "mla", to="mla", dtype=dtype, compression=compression)
    loaded = load_model(tmp_path / "mla")
    assert report.cache_bytes_per_token_after * 2 <= report.cache_bytes_per_token_before
    rows = [loaded.config.attention_of(i).entry_dim for i in range(2)]
    assert report.compression is not None
    assert sum(rows) / 2 == report.compression.channels_after <= 32
    said = json.loads((tmp_path / "mla" / REPORT_FILE).read_text())
    assert said["layout"] == layout
    assert said["perplexity_after"] == report.compression.perplexity_after
    assert [layer["latent"] + layer["rotary"] for layer in said["layers"]] == rows
    assert (tmp_path / "mla" / "tokenizer.json").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "mla", "text.txt"}


@pytest.mark.slow
def test_the_same_bytes_again(tmp_path: Path) -> None:
    source = source_model(tmp_path / "source")
    for name in "ab":
        convert(source, tmp_path / name, to="mla", compression=wanted(tmp_path, layout="free"))
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"
    )
    assert first == second


@pytest.mark.slow
def test_values_beyond_fp16_are_refused(tmp_path: Path) -> None:
    """Of attention whose values are small and whose output makes them large again.

    Regression: weights that silently become infinite.
    """
    source = source_model(tmp_path / "source")

    def scale(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensor *= {"v_proj": 1e-6, "o_proj": 1e6}.get(name.split(".")[-2], 1.0)

    edit_tensors(source, scale)
    with pytest.raises(UserError, match=r"o_proj.weight' has values beyond the range of fp16"):
        convert(source, tmp_path / "mla", to="mla", dtype="fp16", compression=wanted(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}
    convert(source, tmp_path / "mla", to="mla", dtype="bf16", compression=wanted(tmp_path))


@pytest.mark.parametrize(
    ("name", "place"),
    [("norm.weight", "the last norm and the head"), ("layers.1.mlp.up_proj.weight", "layer 1")],
)
def test_weights_without_numbers_are_named(tmp_path: Path, name: str, place: str) -> None:
    source = source_model(tmp_path / "source")
    edit_tensors(source, lambda tensors: tensors[f"model.{name}"][0].fill_(math.nan))
    with pytest.raises(UserError, match=rf"{place}: the output is not finite"):
        convert(source, tmp_path / "mla", to="mla", compression=wanted(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}


def test_only_weights_of_the_checkpoint_are_counted(tmp_path: Path) -> None:
    """Releases have the same weights in another form next to them."""
    source = source_model(tmp_path / "source")
    first = convert(source, tmp_path / "a", to="mla")
    save_file({"other": torch.zeros(9999)}, source / "consolidated.safetensors")
    second = convert(source, tmp_path / "b", to="mla")
    assert second.weight_bytes_before == first.weight_bytes_before
    assert second.bits_per_weight_before == first.bits_per_weight_before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"share": 0.05}, "--cache 0.05 leaves 0 of 64 channels"),
        ({"share": 1.5}, "below 1"),
        ({"method": "best"}, "--method 'best' is unknown; choose one of weighted"),
        ({"share": math.nan}, "--cache nan: give the share"),
        ({"share": math.inf}, "--cache inf: give the share"),
        ({"calibrate": (Path("nowhere.txt"),)}, "nowhere.txt: cannot be read"),
    ],
)
def test_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    source = source_model(tmp_path / "source")
    before = set(tmp_path.iterdir()) | {tmp_path / "text.txt"}
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "mla", to="mla", compression=wanted(tmp_path, **changes))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("layout", ["standard", "free"])
def test_a_recipe_keeps_within_the_budget_or_says_so(tmp_path: Path, layout: Any) -> None:
    """Regression: one key head whose rotation alone is more than was requested."""
    one = replace(GQA, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    source = source_model(tmp_path / "source", attention=one)
    asked = wanted(tmp_path, share=0.25, method="transmla", layout=layout)
    words = (
        r"at least 40 are needed .--method transmla: 32 for the rotary key and 8 more.*keep 0.32 or"
    )
    for share in (0.01, 0.25):
        with pytest.raises(UserError, match=words):
            convert(source, tmp_path / "mla", to="mla", compression=replace(asked, share=share))
    report = convert(source, tmp_path / "mla", to="mla", compression=replace(asked, share=0.32))
    assert report.compression is not None and report.compression.channels_after == 40


def test_heads_whose_pairs_no_fold_divides(tmp_path: Path) -> None:
    source = source_model(tmp_path / "source", attention=GQA)
    asked = wanted(tmp_path, method="transmla")
    report = convert(source, tmp_path / "mla", to="mla", compression=asked)
    assert report.compression is not None and report.compression.fold == 1


FAULTS = {
    "nan": ({"model.layers.1.self_attn.k_proj.weight": math.nan}, "layer 1: the output is not"),
    "large": ({"model.layers.0.mlp.down_proj.weight": 1e32}, "layer 1: the output is not fin"),
    "zero": ({"model.embed_tokens.weight": 0.0}, "layer 0: its residual stream is 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_sensitivities_without_information_are_reported(tmp_path: Path, fault: str) -> None:
    changes, words = FAULTS[fault]
    file = source_model(tmp_path / "source") / "model.safetensors"
    tensors = load_file(file)
    for name, factor in changes.items():
        tensors[name] = tensors[name] * factor
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=words):
        convert(file.parent, tmp_path / "mla", to="mla", compression=wanted(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}


def test_models_that_cannot_be_calibrated_are_said_before(tmp_path: Path) -> None:
    source = source_model(tmp_path / "source", vocab_size=100)
    with pytest.raises(UserError, match=r"its tokenizer returns token \d+, but the model has 100"):
        convert(source, tmp_path / "mla", to="mla", compression=wanted(tmp_path))
    gqa = EVERY["combined gqa"]
    save_model(random_model(gqa, torch.float32), gqa, tmp_path / "mtp", source=None)
    with pytest.raises(UserError, match="--cache: the model has MTP modules"):
        convert(tmp_path / "mtp", tmp_path / "mla", to="mla", compression=wanted(tmp_path))


@pytest.mark.slow
def test_another_text_of_equal_length_is_not_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: layers of two calibrations in one model."""
    source = source_model(tmp_path / "source")
    asked = wanted(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(restart, "_to_disk", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "mla", to="mla", compression=asked)
    (text,) = asked.calibrate
    before = text.read_text()
    text.write_text(before[::-1])
    with pytest.raises(UserError, match="an unfinished conversion that differs in its options"):
        convert(source, tmp_path / "mla", to="mla", compression=asked)
    text.write_text(before)
    with monkeypatch.context() as patch:
        patch.setattr("lowlat.convert.run.digest_of", lambda folder: "of another processor")
        with pytest.raises(UserError, match="differs in its calibration"):
            convert(source, tmp_path / "mla", to="mla", compression=asked)
    convert(source, tmp_path / "mla", to="mla", compression=asked)


def test_an_existing_destination_is_refused_before_calibration(tmp_path: Path) -> None:
    source = source_model(tmp_path / "source")
    (tmp_path / "mla").mkdir()
    with pytest.raises(UserError, match="exists already"):
        convert(
            source,
            tmp_path / "mla",
            to="mla",
            compression=wanted(tmp_path, calibrate=(Path("nowhere"),)),
        )


def test_without_to_mla_it_is_refused(tmp_path: Path) -> None:
    source = source_model(tmp_path / "source")
    with pytest.raises(UserError, match="add --to mla"):
        convert(source, tmp_path / "mla", dtype="bf16", compression=wanted(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((None, None, "free", ()), "--layout needs --cache"),
        ((None, None, "standard", ()), "--layout needs --cache"),
        ((None, "weighted", None, ()), "--method needs --cache"),
        ((None, "transmla", None, ()), "--method needs --cache"),
        ((None, None, None, (Path("a"),)), "--calibrate needs --cache"),
        ((0.5, "exact", "standard", ()), "--method exact does not compress"),
        ((0.5, "weighted", "wide", ()), "--layout 'wide' is unknown; choose standard or free"),
    ],
)
def test_options_without_effect(options: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        compression_options(*options, to="mla")


def test_exact_needs_no_options() -> None:
    assert compression_options(None, "exact", None, (), to="mla") is None
    assert compression_options(None, None, None, (), to="mla") is None


def test_what_is_left_out_has_its_default() -> None:
    asked = compression_options(0.5, None, None, (), to="mla")
    assert asked is not None and (asked.method, asked.layout) == ("weighted", "standard")


def test_what_a_killed_process_left_goes(tmp_path: Path) -> None:
    left = tmp_path / ".mla.calibration"
    left.mkdir()
    (left / "statistics-0.safetensors").write_bytes(b"cut sho")
    with scratch_folder(tmp_path / "mla") as folder:
        assert [path.name for path in folder.iterdir()] == ["lock"]
        with pytest.raises(UserError, match="another process"), scratch_folder(tmp_path / "mla"):
            pass
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "remedy"),
    [(errno.EROFS, "choose another"), (errno.ENOSPC, "free some space and repeat")],
)
def test_a_disk_that_takes_no_scratch_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int, remedy: str
) -> None:
    monkeypatch.setattr(Path, "mkdir", Mock(side_effect=OSError(fault, os.strerror(fault))))
    words = rf"mla: cannot be written \({os.strerror(fault)}\); {remedy}"
    with pytest.raises(UserError, match=words), scratch_folder(tmp_path / "mla"):
        pass


def test_a_disk_too_small_is_said_before_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_model(tmp_path / "source")
    usage = restart.shutil.disk_usage(tmp_path)._replace(free=restart.SPARE_BYTES)
    monkeypatch.setattr(restart.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr("lowlat.convert.run._compressed_weights", Mock(side_effect=AssertionError))
    with pytest.raises(UserError, match="mla: 17 MB are needed, 16 MB are free on its disk"):
        convert(source, tmp_path / "mla", to="mla", compression=wanted(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}


def test_a_full_disk_while_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lowlat.convert.compression.scratch.file_pieces", full)
    source = source_model(tmp_path / "source")
    with pytest.raises(UserError, match=r"cannot be written .*No space left.*free some space"):
        convert(source, tmp_path / "mla", to="mla", compression=wanted(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "text.txt"}
