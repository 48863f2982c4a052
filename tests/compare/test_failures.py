"""Errors of peers: one line and exit code 2. Unexpected errors: exit code 70. No result either."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers.models.llama import modeling_llama

from lowlat.cli import main
from lowlat.compare.implementations.base import REMEDY
from lowlat.compare.implementations.lowlat_pytorch import LowlatPyTorch
from lowlat.compare.implementations.peers import LlamaCppModel, run_in_worker
from lowlat.compare.implementations.transformers import load_transformers
from lowlat.utils.errors import UserError
from tests.unit.peers import fake_worker

from .models import llama_case, own_side, window, write

Raise = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(llama_case(), tmp_path_factory.mktemp("llama"))


def raising(error: Exception) -> Raise:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def ended(*arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of the command."""
    words = ["lowlat", "compare", *map(str, arguments), "--tokens", "5"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as found:
        main.run()
    return int(found.value.code or 0)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("shapes differ:\n  [3] and [4]"), "RuntimeError: shapes differ: [3] and [4]"),
        (MemoryError(), "MemoryError"),
        (KeyError("rope"), "KeyError: 'rope'"),
    ],
    ids=["lines", "memory", "key"],
)
def test_transformers_that_fails_while_it_runs(
    folder: Path, error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_side(folder).config
    theirs = load_transformers(folder, config, label="theirs", dtype=torch.float32)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", raising(error))
    with pytest.raises(UserError) as caught:
        theirs.trace(window())
    line = f"theirs: transformers fails at run time: {says}; {REMEDY}"
    assert str(caught.value) == line and caught.value.__cause__ is error


def test_a_peers_failure_ends_with_2(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regression: a crash that reads as a difference."""
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", raising(RuntimeError("no kernel")))
    assert ended(folder, f"transformers:{folder}", monkeypatch=monkeypatch) == 2
    said = capsys.readouterr().err
    last = said.splitlines()[-1]
    assert last.startswith(f"lowlat: error: transformers:{folder}: ") and "Traceback" not in said
    assert "RuntimeError: no kernel" in last


@pytest.mark.parametrize("error", [ZeroDivisionError("own fault"), MemoryError()], ids=type)
def test_unexpected_errors_end_with_70_and_its_traceback(
    folder: Path,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(LowlatPyTorch, "trace", raising(error))
    assert ended(folder, folder, monkeypatch=monkeypatch) == 70
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "in fail\n" in said and type(error).__name__ in said.splitlines()[-1]


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
@pytest.mark.parametrize(("other", "code"), [("", 0), ("@int4", 1)], ids=["equal", "different"])
def test_a_reader_that_leaves_changes_no_verdict(
    folder: Path,
    options: tuple[str, ...],
    other: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        arguments = (folder, f"{folder}{other}", *options, "--tolerance", "1e-5")
        assert ended(*arguments, monkeypatch=monkeypatch) == code


def test_peers_that_cannot_be_imported_are_not_called_missing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_side(folder).config
    monkeypatch.setitem(sys.modules, "transformers.modeling_layers", ModuleType("old"))
    with pytest.raises(UserError) as caught:
        load_transformers(folder, config, label="t", dtype=torch.float32)
    assert str(caught.value).startswith("t: transformers cannot be imported: ImportError: ")
    assert "MtpModel" in str(caught.value) and "pip install" not in str(caught.value)
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('no libllama.so')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    with pytest.raises(UserError, match=r"g: llama-cpp-python cannot .* RuntimeError: no libllama"):
        LlamaCppModel(tmp_path / "m.gguf", config, label="g", precision="fp32")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("user", "dtype 'x' is unknown; choose another"),
        ("raise", f"fails at run time: failed: RuntimeError: first line second line; {REMEDY}"),
        ("exit", f"fails at run time: ended with 3; the reason for its end; {REMEDY}"),
        ("abort", f"fails at run time: killed by SIGABRT; .*{REMEDY}"),
        ("absent", f"fails at run time: no module named fake; {REMEDY}"),
        ("memory", f"fails at run time: failed: MemoryError; {REMEDY}"),
    ],
)
def test_a_failing_worker_is_one_line(
    kind: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(fake_worker.__file__).parent))
    with pytest.raises(UserError, match=f"^peer: {says}$") as caught:
        run_in_worker("fake_worker", [{"op": "fail", "kind": kind}], label="peer")
    assert "\n" not in str(caught.value)
