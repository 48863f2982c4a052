"""llama.cpp itself as a side: lowlat's logits, and what it says of a file it cannot read.

Opt-in: where llama_cpp can be imported, or LOWLAT_LLAMA_PYTHON names an interpreter of the same
Python that has llama-cpp-python.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from lowlat.cli import main
from lowlat.compare.implementations.peers import LlamaCppModel
from lowlat.convert.run import convert
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer
from tests.parity.draw import Case

from .models import EQUAL_SCALES, llama_case, own_side, v3_case, window, write

PYTHON = os.environ.get("LOWLAT_LLAMA_PYTHON", "")
NEEDED = ("llama_cpp", "diskcache")
"""Its module, and the one it imports that lowlat has no use for."""
FIND = (
    "import importlib.util, sys; "
    "print(*[importlib.util.find_spec(n).submodule_search_locations[0] for n in sys.argv[1:]])"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON and importlib.util.find_spec("llama_cpp") is None,
        reason="llama_cpp cannot be imported, and LOWLAT_LLAMA_PYTHON names no interpreter with it",
    ),
]


@pytest.fixture(autouse=True)
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other interpreter's modules, and nothing else of it, for llama.cpp's process; here a
    name is enough, and the module itself leaves files open.
    """
    monkeypatch.setitem(sys.modules, "llama_cpp", ModuleType("llama_cpp"))
    if not PYTHON:
        return
    command = [PYTHON, "-c", FIND, *NEEDED]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    site = tmp_path / "site"
    site.mkdir()
    for place in map(Path, found.stdout.split()):
        (site / place.name).symlink_to(place)
    monkeypatch.setenv("PYTHONPATH", str(site))


def compared(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main.app, ["compare", *map(str, arguments)])


def written(case: Case, folder: Path) -> tuple[Path, Path]:
    """A checkpoint that reads bytes, and its file in fp32."""
    source, file = write(case, folder / "m"), folder / "m.gguf"
    byte_tokenizer().save(source)
    convert(source, file, dtype="fp32")
    return source, file


@pytest.mark.parametrize("name", ["llama", "v3"])
def test_llama_cpp_computes_the_same(name: str, tmp_path: Path) -> None:
    """Equal in windows of two lengths, and different from a model of other weights."""
    plain, rope = {"vocab_size": 269}, {"rope_parameters": dict(EQUAL_SCALES)}
    case = llama_case(**plain) if name == "llama" else v3_case(**plain, **rope)
    source, file = written(case, tmp_path)
    same = compared(source, f"gguf:{file}", "--tokens", "23", "--window", "13")
    assert same.exit_code == 0, (same.output, same.exception)
    assert "equal within 0.0001" in same.output
    other = compared(f"{source}@int4", f"gguf:{file}", "--tokens", "5", "--tolerance", "1e-4")
    assert other.exit_code == 1 and "first difference at output logits" in other.output


def test_what_it_says_of_a_broken_file(tmp_path: Path) -> None:
    source, file = written(llama_case(vocab_size=269), tmp_path)
    raw, key = file.read_bytes(), b"llama.attention.layer_norm_rms_epsilon"
    assert raw.count(key) == 1
    (tmp_path / "broken.gguf").write_bytes(raw.replace(key, key[:-1] + b"m"))
    side = LlamaCppModel(
        tmp_path / "broken.gguf", own_side(source).config, label="broken", precision="fp32"
    )
    with pytest.raises(UserError) as caught:
        side.trace(window(5, 0))
    assert str(caught.value).startswith("broken: llama.cpp cannot load it: ")
    assert key[:-1].decode() in str(caught.value) and "\n" not in str(caught.value)
