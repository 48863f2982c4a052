"""Metadata of GGUF files: kept byte for byte through GGUF files and folders, made anew where the
conversion or its user changed what a key describes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from gguf import GGUFValueType as Type

from lowlat.checkpoint.gguf.file import GGUFFile
from lowlat.checkpoint.gguf.kept_metadata import METADATA_FILE
from lowlat.checkpoint.load import load_model
from lowlat.checkpoint.save import save_model
from lowlat.convert.run import convert
from lowlat.text.tokenizer import Tokenizer
from lowlat.utils.errors import UserError
from tests.unit.checkpoint.builders import FAMILIES, gqa, write_model
from tests.unit.checkpoint.gguf_files import Typed, write_gguf

from .texts import write_tokenizer

DESCRIPTION = {
    "general.type": "model",
    "general.license": "apache-2.0",
    "general.languages": ["en", "de"],
    "quantize.imatrix.chunks_count": 7,
    "someones.own.key": 2.5,
    "tokenizer.ggml.model": "none",
    "tokenizer.ggml.tokens": ["a", "b"],
    "general.file_type": 0,
}


@pytest.mark.parametrize(
    ("name", "absorbed"),
    [("llama", False), ("qwen2", False), ("deepseek_v3", True), ("deepseek_v2", True)],
)
def test_a_gguf_source_keeps_its_metadata(tmp_path: Path, name: str, absorbed: bool) -> None:
    """Of a real file 8 keys were lost and 4 added; now only the data type changes."""
    model = write_model(tmp_path / "m", FAMILIES[name])
    parameters = model.state_dict()
    source = write_gguf(
        tmp_path / "a.gguf", model.config, parameters, split_kv_b=absorbed, keys=DESCRIPTION
    )
    convert(source, tmp_path / "b.gguf", dtype="bf16")
    before, after = GGUFFile(source), GGUFFile(tmp_path / "b.gguf")
    assert list(after.metadata) == list(before.metadata)
    changed = [key for key in before.metadata if before.entry(key) != after.entry(key)]
    assert changed == ["general.file_type"]
    assert load_model(tmp_path / "b.gguf").config == load_model(source).config


def test_a_changed_layout_gets_its_own_keys(tmp_path: Path) -> None:
    """attn_kv_b becomes attn_k_b and attn_v_b: the rest stays."""
    model = write_model(tmp_path / "m", FAMILIES["deepseek_v3"])
    source = write_gguf(tmp_path / "a.gguf", model.config, model.state_dict(), keys=DESCRIPTION)
    convert(source, tmp_path / "b.gguf", dtype="bf16")
    before, after = GGUFFile(source), GGUFFile(tmp_path / "b.gguf")
    assert "deepseek2.attention.key_length_mla" in after.metadata
    for key in DESCRIPTION.keys() - {"general.file_type"}:
        assert before.entry(key) == after.entry(key)
    assert load_model(tmp_path / "b.gguf").config == load_model(source).config


ODD = {
    "odd.uint8": Typed(200, Type.UINT8),
    "odd.int8": Typed(-100, Type.INT8),
    "odd.uint16": Typed(65535, Type.UINT16),
    "odd.int16": Typed(-32768, Type.INT16),
    "odd.uint32": Typed(2**32 - 1, Type.UINT32),
    "odd.int32": Typed(-(2**31), Type.INT32),
    "odd.float32": Typed(0.1, Type.FLOAT32),
    "odd.bool": Typed(True, Type.BOOL),
    "odd.text": Typed("line\nline \u65e5\u672c", Type.STRING),
    "odd.no_text": Typed("", Type.STRING),
    "odd.uint64": Typed(2**64 - 1, Type.UINT64),
    "odd.int64": Typed(-(2**63), Type.INT64),
    "odd.float64": Typed(1e300, Type.FLOAT64),
    "odd.not a number": Typed(float("nan"), Type.FLOAT64),
    "odd.uint8s": Typed([0, 255], Type.ARRAY, Type.UINT8),
    "odd.bools": Typed([True, False], Type.ARRAY, Type.BOOL),
    "odd.float32s": Typed([1.5] * 300, Type.ARRAY, Type.FLOAT32),
    "odd.float64s": Typed([0.1, float("inf")], Type.ARRAY, Type.FLOAT64),
    "odd.uint64s": Typed([2**64 - 1], Type.ARRAY, Type.UINT64),
    "odd.texts": Typed(["", "a", "\u00df"], Type.ARRAY, Type.STRING),
}
"""Keys of no known meaning, of every value type."""


def entries(path: Path) -> dict[str, bytes]:
    """All keys in order, as the file holds them, but the one of the data type."""
    file = GGUFFile(path)
    return {key: file.entry(key) for key in file.metadata if key != "general.file_type"}


@pytest.mark.parametrize("name", ["qwen2", "deepseek_v3"])
def test_a_folder_keeps_the_metadata_of_its_file(tmp_path: Path, name: str) -> None:
    """GGUF -> folder -> packed folder -> GGUF: every key with its type, place and bytes."""
    model = write_model(tmp_path / "m", FAMILIES[name])
    keys = ODD | DESCRIPTION | {"general.alignment": 64}
    source, absorbed = tmp_path / "a.gguf", name == "deepseek_v3"
    write_gguf(source, model.config, model.state_dict(), split_kv_b=absorbed, keys=keys)
    convert(source, tmp_path / "bf16", dtype="bf16")
    convert(tmp_path / "bf16", tmp_path / "int8", dtype="int8")
    convert(tmp_path / "int8", tmp_path / "b.gguf", dtype="fp32")
    before, after = entries(source), entries(tmp_path / "b.gguf")
    assert ODD.keys() < after.keys()
    del before["general.alignment"]  # of the file, not of the model
    assert list(after.items()) == list(before.items())
    # and the gguf package reads the same values
    values = GGUFReader(tmp_path / "b.gguf").fields
    for key, (value, *_) in ODD.items():
        found = values[key].contents()
        is_float = isinstance(value, float)
        assert found == (pytest.approx(value, nan_ok=True) if is_float else value), key


def test_a_resized_vocabulary_gets_its_own_size(tmp_path: Path) -> None:
    """Regression: the size of the kept metadata stood beside tensors of another size."""
    model = write_model(tmp_path / "m", FAMILIES["llama"])
    keys = DESCRIPTION | {"llama.vocab_size": model.config.vocab_size + 1}
    write_gguf(tmp_path / "a.gguf", model.config, model.state_dict(), keys=keys)
    convert(tmp_path / "a.gguf", tmp_path / "bf16", dtype="bf16")
    convert(tmp_path / "bf16", tmp_path / "b.gguf", dtype="bf16")
    assert GGUFFile(tmp_path / "b.gguf").metadata["llama.vocab_size"] == model.config.vocab_size


def test_a_saved_model_keeps_them_too(tmp_path: Path) -> None:
    """`Model.save` of a split model: without the keys of its parts."""
    model = write_model(tmp_path / "m", FAMILIES["llama"])
    write_gguf(
        tmp_path / "a.gguf",
        model.config,
        model.state_dict(),
        keys=ODD | {"tokenizer.ggml.model": "none"},
        split=3,
    )
    part = next(iter(sorted(tmp_path.glob("a-00002-of-*.gguf"))))
    save_model(model, model.config, tmp_path / "saved", source=part)
    kept = GGUFFile(tmp_path / "saved" / METADATA_FILE)
    assert not kept.tensors
    assert ODD.keys() < kept.metadata.keys()
    assert not [key for key in kept.metadata if key.startswith("split.")]


def test_a_vocabulary_comes_back_unless_it_was_changed(tmp_path: Path) -> None:
    """A folder's own tokenizer wins over the kept one; other keys stay."""
    write_model(tmp_path / "m", replace(gqa("llama"), vocab_size=307))
    write_tokenizer(tmp_path / "m")
    convert(tmp_path / "m", tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "folder", dtype="bf16")
    convert(tmp_path / "folder", tmp_path / "b.gguf")
    assert entries(tmp_path / "b.gguf") == entries(tmp_path / "a.gguf")
    settings = tmp_path / "folder" / "tokenizer_config.json"
    changed = json.loads(settings.read_text()) | {"chat_template": "other"}
    for file in (tmp_path / "folder").glob("chat_template*"):
        file.unlink()
    settings.write_text(json.dumps(changed))
    convert(tmp_path / "folder", tmp_path / "c.gguf")
    assert Tokenizer.from_gguf(tmp_path / "c.gguf").chat_template == "other"
    assert entries(tmp_path / "c.gguf").keys() == entries(tmp_path / "a.gguf").keys()


def test_a_changed_config_wins(tmp_path: Path) -> None:
    """Keys of the architecture are made anew if config.json no longer says the same."""
    model = write_model(tmp_path / "m", FAMILIES["qwen2"])
    source = write_gguf(
        tmp_path / "a.gguf", model.config, model.state_dict(), keys=ODD | DESCRIPTION
    )
    convert(source, tmp_path / "folder", dtype="bf16")
    file = tmp_path / "folder" / "config.json"
    raw: dict[str, Any] = json.loads(file.read_text()) | {"rope_theta": 12345.0}
    file.write_text(json.dumps(raw))
    convert(tmp_path / "folder", tmp_path / "b.gguf")
    after = GGUFFile(tmp_path / "b.gguf")
    assert after.metadata["qwen2.rope.freq_base"] == 12345.0
    assert all(after.entry(key) == GGUFFile(source).entry(key) for key in ODD)


def test_damaged_metadata_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "m", FAMILIES["qwen2"])
    (tmp_path / "m" / METADATA_FILE).write_bytes(b"GGUF\x03")
    with pytest.raises(UserError, match=f"{METADATA_FILE}: the file ends within"):
        convert(tmp_path / "m", tmp_path / "b.gguf")
