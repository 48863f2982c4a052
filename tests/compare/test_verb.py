"""The verb: exit codes, text, JSON, plot, and one line for every fault."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fakes import byte_tokenizer
from typer.testing import CliRunner, Result

from lowlat.attention.packed import PackedAttention
from lowlat.checkpoint.load import load_model
from lowlat.cli import main
from lowlat.utils.errors import UserError

from .sides import llama_case, v3_case, write

Invoke = Callable[..., Result]
VOCAB = 269


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that reads bytes."""
    path = write(llama_case(vocab_size=VOCAB), tmp_path_factory.mktemp("bytes"))
    byte_tokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(v3_case(), tmp_path_factory.mktemp("v3"))


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["compare", *map(str, arguments)])


def fault(*arguments: str | Path) -> str:
    """The one line of a fault the user can mend, which ends the program with 2."""
    result = invoke(*arguments)
    assert isinstance(result.exception, UserError), result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def test_equal_ends_with_0(folder: Path) -> None:
    result = invoke(folder, f"transformers:{folder}", "--tokens", "19")
    assert result.exit_code == 0, result.output
    assert "equal within 0.0001" in result.output and "layer 1" in result.output


def test_different_ends_with_1_and_names_the_place(folder: Path) -> None:
    result = invoke(folder, f"{folder}@int4", "--tolerance", "0.01", "--tokens", "19")
    assert result.exit_code == 1
    assert "differ first at layer 0 q" in result.output
    assert "no known mistake explains it" in result.output.replace("\n", " ")


def test_all_lists_every_part(folder: Path) -> None:
    short, full = (invoke(folder, folder, "--tokens", "9", *more) for more in ((), ("--all",)))
    assert "k_rotated" in full.output and "post_norm" in full.output
    assert "k_rotated" not in short.output


def test_json_is_strict_and_alone_on_stdout(v3: Path) -> None:
    result = invoke(v3, f"{v3}@int4", "--json", "--start", "501", "--tokens", "17")
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert report["format"] == 1 and report["start"] == 501 and report["tokens"] == 17
    assert (result.exit_code == 0) == report["equal"]
    assert report["a"]["precision"] == "fp32" and report["b"]["precision"] == "int4"
    blocks = {item["block"] for item in report["parts"]}
    assert blocks == {"embedding", "layer 0", "layer 1", "output", "mtp 0", "mtp 1"}
    assert {item["block"] for item in report["logits"]} == {"output", "mtp 0", "mtp 1"}
    assert {item["block"] for item in report["experts"]} == {"layer 1", "mtp 0", "mtp 1"}


def test_text_is_read_by_the_tokenizer_in_windows(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm, and the boats lay in the harbour.")
    options = ("--text", text, "--tokens", "40", "--window", "16", "--json")
    report = json.loads(invoke(folder, folder, *options).stdout)
    assert (report["tokens"], report["windows"]) == (40, 3)


@pytest.mark.parametrize("ending", ["svg", "png"])
def test_plot_is_written(v3: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"plot.{ending}"
    invoke(v3, f"{v3}@bf16", "--plot", path, "--tokens", "9")
    assert path.stat().st_size > 5000


def test_faults_of_the_sides(folder: Path, v3: Path, tmp_path: Path) -> None:
    assert "does not exist" in fault(tmp_path / "none", folder)
    assert "vocab_size is 269 and 97" in fault(folder, v3)
    assert "holds no fp8 blocks" in fault(folder, f"{folder}@fp8")
    assert "option 'fast' is unknown" in fault(folder, f"{folder}@bf16,fast")
    assert "is a folder; give a .gguf file" in fault(folder, f"gguf:{folder}")
    assert "experts cannot be imposed" in fault(folder, f"{folder}@native", "--fix-experts")


def test_sizes_that_differ_are_named(folder: Path, tmp_path: Path) -> None:
    other = write(llama_case(vocab_size=VOCAB, num_hidden_layers=1), tmp_path)
    assert "num_hidden_layers is 2 and 1" in fault(folder, other)


def test_an_unreadable_model_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in fault(folder, tmp_path)
    assert "config.json" in fault(folder, f"transformers:{tmp_path}")


def test_faults_of_the_text(folder: Path, v3: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("a")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert "is too short: 1 tokens" in fault(folder, folder, "--text", tmp_path / "short")
    assert "is no UTF-8 text" in fault(folder, folder, "--text", tmp_path / "latin")
    assert "cannot read" in fault(folder, folder, "--text", tmp_path / "none")
    assert "--text needs a tokenizer" in fault(v3, v3, "--text", tmp_path / "short")
    assert "at least 2" in fault(folder, folder, "--tokens", "1")
    assert "max_position_embeddings" in fault(folder, folder, "--start", "9000")


def test_transformers_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in fault(folder, f"transformers:{folder}")


def test_llama_cpp_that_is_not_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr("lowlat.compare.open.prepare", lambda name, progress: as_file(name, folder))
    monkeypatch.setattr("lowlat.compare.open.config_of", lambda path: load_model(folder).config)
    assert "pip install llama-cpp-python" in fault(folder, f"gguf:{tmp_path}/m.gguf")


def test_llama_cpp_shows_logits_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stand-in for llama_cpp.Llama that computes with lowlat's model."""
    module: Any = ModuleType("llama_cpp")

    class Llama:
        def __init__(self, model_path: str, logits_all: bool, **_: object) -> None:
            assert logits_all and model_path.endswith("m.gguf")
            self.model, self.scores = load_model(folder, dtype="fp32").model, np.zeros(0)

        def eval(self, ids: list[int]) -> None:
            backend = PackedAttention([len(ids)])
            with torch.no_grad():
                hidden = self.model(torch.tensor(ids), backend.positions(), backend)
                self.scores = self.model.logits(hidden).numpy()

    module.Llama = Llama
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr("lowlat.compare.open.prepare", lambda name, progress: as_file(name, folder))
    monkeypatch.setattr("lowlat.compare.open.config_of", lambda path: load_model(folder).config)
    result = invoke(folder, f"gguf:{tmp_path}/m.gguf", "--tolerance", "1e-4", "--tokens", "9")
    assert result.exit_code == 0, result.output
    assert "llama.cpp shows logits alone" in result.output
    assert "reads from position 0" in fault(folder, f"gguf:{tmp_path}/m.gguf", "--start", "3")


def as_file(name: str, folder: Path) -> Path:
    """Names of GGUF files as they are, all else the folder."""
    return Path(name) if name.endswith(".gguf") else folder


def test_plot_without_matplotlib_is_said_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--plot needs matplotlib" in fault("nothing", "nothing", "--plot", tmp_path / "p.svg")


def test_the_entry_point_ends_with_the_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code in (
        ((folder, folder, "--tokens", "5"), 0),
        ((folder, f"{folder}@int4", "--tolerance", "0", "--tokens", "5"), 1),
        ((folder, "nothing"), 2),
    ):
        monkeypatch.setattr(sys, "argv", ["lowlat", "compare", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main.run()
        assert (ended.value.code or 0) == code
