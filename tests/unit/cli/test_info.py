"""`lowlat info`: exact numbers as JSON and as tables; presets without weights, checkpoints too."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from lowlat.checkpoint.save import save_model
from lowlat.cli.info import DTYPES, Subject, find, info, machine_of
from lowlat.cli.info_view import show
from lowlat.config.hf.writer import config_to_hf
from lowlat.config.model import Packing
from lowlat.config.parameter_count import count_parameters
from lowlat.config.presets import load_preset, preset_names
from lowlat.model.transformer import Transformer
from lowlat.utils.errors import UserError
from tests import fakes
from tests.lowlat_configs import EVERY, random_model


def report(capsys: pytest.CaptureFixture[str], model: str, **options: Any) -> dict[str, Any]:
    info(model, json_output=True, **options)
    return json.loads(capsys.readouterr().out)


def tables(name: str, width: int, memory: dict[str, int] | None = None) -> str:
    out = StringIO()
    show(name, load_preset(name), memory, None, Console(file=out, width=width))
    return out.getvalue()


def test_json_of_deepseek_v3(capsys: pytest.CaptureFixture[str]):
    found = report(capsys, "deepseek-v3")
    assert found.pop("machine")["fits_in_memory"] is False
    assert found == {
        "parameters": {
            "total": 671_026_419_200,
            "active": 37_552_297_472,
            "active_without_embedding": 36_625_618_432,
            "mtp": 11_610_068_224,
        },
        "cache": {"bytes_per_token": 70_272, "elements_per_token_layer": 576},
        "alternatives": {
            "mha": {"bytes_per_token": 3_997_696},
            "gqa8": {"bytes_per_token": 249_856},
            "mqa": {"bytes_per_token": 31_232},
        },
        "gqa_groups_equivalent": 2.25,
    }


def test_what_to_expect_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A model beyond memory is read from disk at every token; packed ones need the memory."""
    monkeypatch.setattr("lowlat.cli.info.memory_limit", lambda: 2**33)
    monkeypatch.setattr("lowlat.utils.memory.memory_limit", lambda: 2**33)
    small = report(capsys, "smollm2-135m")["machine"]
    assert small == {
        "weights_bytes": 134_515_008 * 2,
        "memory_bytes": 2**33,
        "fits_in_memory": True,
        "read_in_place": True,
        "active_bytes": 134_515_008 * 2,
    }
    info("smollm2-135m")
    assert "the weights fit." in capsys.readouterr().out
    long = {"context": 2**20, "cache": "bf16"}
    assert report(capsys, "smollm2-135m", **long)["machine"]["fits_with_cache"] is False
    info("smollm2-135m", **long)
    assert "not together with this KV cache" in " ".join(capsys.readouterr().out.split())
    assert report(capsys, "smollm2-135m", context=2048)["machine"]["fits_with_cache"] is True
    info("deepseek-v3")
    assert "from disk by selected" in " ".join(capsys.readouterr().out.split())
    for dtype in ("int4", "bf16", "fp32"):
        info("deepseek-v3", dtype=dtype)
        assert f"too small for {dtype}" in capsys.readouterr().out
    info("deepseek-v3", dtype="auto")
    assert "from disk by selected" in " ".join(capsys.readouterr().out.split())
    info("qwen2.5-72b")
    told = " ".join(capsys.readouterr().out.split())
    assert "read from disk at every step" in told and "experts" not in told.split("this machine")[1]


def test_ratios_are_of_the_bytes_next_to_them(capsys: pytest.CaptureFixture[str]) -> None:
    """A rotary key stays bf16 in an int8 cache: so channels are no measure."""
    info("deepseek-v2-lite", cache="int8")
    rows = re.findall(r"([\d,]+) +[\d,.]+ +(\d+\.\d\d) ", capsys.readouterr().out)
    sizes = [int(size.replace(",", "")) for size, _ in rows]
    assert len(rows) == 4
    assert [float(ratio) for _, ratio in rows] == [round(s / sizes[0], 2) for s in sizes]


@pytest.mark.parametrize("packing", ["int8", "int4"])
def test_packed_checkpoints_are_read_in_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], packing: Packing
):
    config = replace(fakes.gqa_config(), packing=packing)
    subject = Subject(name="packed", config=config, stored_bytes=1000)
    found = {dtype: machine_of(subject, dtype)["read_in_place"] for dtype in (None, *DTYPES)}
    kept = {dtype for dtype, is_read in found.items() if is_read}
    assert kept == {None, "bf16", packing}


def test_context_and_dtype(capsys: pytest.CaptureFixture[str]):
    memory = report(capsys, "smollm2-135m", context=1000)["memory"]
    assert memory == {
        "weights_bytes": 134_515_008 * 2,
        "cache_bytes": 23_040 * 1000,
        "context": 1000,
    }
    wide = report(capsys, "smollm2-135m", context=1000, dtype="fp32")
    assert wide["memory"]["weights_bytes"] == 134_515_008 * 4
    assert wide["memory"]["cache_bytes"] == 46_080 * 1000
    packed = report(capsys, "smollm2-135m", context=1000, dtype="int4", cache="int8")
    assert packed["cache"]["bytes_per_token"] == 30 * (384 + 6 * 4)
    assert packed["memory"]["cache_bytes"] == 12_240 * 1000
    assert packed["memory"]["weights_bytes"] < 134_515_008 * 1.2
    assert wide["cache"]["bytes_per_token"] == 46_080
    auto = report(capsys, "smollm2-135m", context=1000, dtype="auto")
    assert auto["memory"] == memory


@pytest.mark.parametrize("width", [80, 120])
def test_tables_print_the_published_figures(width: int):
    text = tables("deepseek-v3", width, {"weights_bytes": 1, "cache_bytes": 2, "context": 131_072})
    for figure in ("671.026B", "36.63B", "37.55B", "11.610B", "13.463B", "684.49B"):
        assert figure in text
    for figure in ("70,272", "3,997,696", "249,856", "31,232", "2.25", "131,072"):
        assert figure in text


@pytest.mark.parametrize("name", preset_names())
def test_tables_fit_a_narrow_terminal(name: str):
    """A cell that does not fit ends in an ellipsis, and a number cut short is a wrong number."""
    text = tables(name, 80, {"weights_bytes": 10**12, "cache_bytes": 10**10, "context": 10**6})
    assert "…" not in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_a_preset_needs_neither_torch_nor_files():
    code = (
        "import sys; from lowlat.cli.info import info; "
        "info('kimi-k2', True, 10, None); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cache"]["bytes_per_token"] == 70_272


def test_default_is_known_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Same cache as the model it is converted from, without fetching anything."""
    monkeypatch.setenv("LOWLAT_CACHE", str(tmp_path))
    converted = report(capsys, "default")
    assert converted["cache"] == report(capsys, "smollm2-135m")["cache"]
    assert list(tmp_path.iterdir()) == []


def test_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Counted as configured, weighed as stored unless a dtype is asked for."""
    config = replace(
        load_preset("smollm2-135m"), hidden_size=18, intermediate_size=7, vocab_size=11
    )
    parameters = Transformer(config, dtype=torch.float16).state_dict()
    save_file(
        {f"model.{name}": x for name, x in parameters.items()}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    size = sum(parameter.numel() for parameter in parameters.values())
    assert find(str(tmp_path)).config == config
    found = report(capsys, str(tmp_path), context=3)
    assert found["parameters"]["total"] == size
    assert found["memory"]["weights_bytes"] == size * 2
    wide = report(capsys, str(tmp_path), context=3, dtype="fp64")
    assert wide["memory"]["weights_bytes"] == size * 8


def test_text_form(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    info("deepseek-v3", context=200_000)
    text = capsys.readouterr().out
    assert "671.026B" in text and "Memory at 200,000 tokens" in text
    assert "beyond the model's 163,840 tokens" in text


def test_dense_and_tied_models_have_no_rows_without_meaning():
    text = tables("smollm2-135m", 80)
    assert "active" not in text and "experts" not in text and "MTP" not in text
    assert "also the LM head" in text


def test_odd_forms_are_named():
    config = replace(load_preset("llama-3.1-8b"))
    for groups, form in ((1, "MQA"), (32, "MHA, 32 heads"), (4, "GQA, 4 groups")):
        out = StringIO()
        attention = replace(config.attention, num_key_value_heads=groups)
        show("x", replace(config, attention=attention), None, None, Console(file=out, width=80))
        assert f"this model: {form}" in out.getvalue()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("gla-2", "GLA-2, 2 x 13 + 6"),
        ("gta-3", "GTA-3, 3 x 10 + 4"),
        ("tpa", "TPA, ranks 2 + 1"),
        ("combined mha", "MHA, 6 heads"),
        ("layers all", "MLA 3-101 + 2-34"),
    ],
)
def test_forms_of_the_lowlat_family(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = EVERY[name]
    save_model(random_model(config, torch.bfloat16), config, tmp_path / "model", source=None)
    info(str(tmp_path / "model"))
    assert f"this model: {form}" in capsys.readouterr().out
    found = report(capsys, str(tmp_path / "model"))
    rows = [config.attention_of(layer).entry_dim for layer in range(config.num_hidden_layers)]
    assert found["cache"]["elements_per_token_layer"] == sum(rows) / len(rows)
    assert found["cache"]["bytes_per_token"] == 2 * sum(rows)
    assert found["parameters"]["total"] == count_parameters(config).total


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 0}, "--context 0"),
        ({"context": -5}, "--context -5"),
        ({"dtype": "int3"}, "--dtype 'int3'"),
        ({"dtype": ""}, "--dtype ''"),
        ({"cache": "fp32"}, "--cache 'fp32'"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        info("deepseek-v3", **options)


def test_unknown_model(tmp_path: Path):
    with pytest.raises(UserError, match="no-such-model"):
        info("no-such-model")
    with pytest.raises(UserError, match=r"config\.json"):
        info(str(tmp_path))
