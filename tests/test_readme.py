"""The commands and the Python example of README.md run as they are printed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT = 900


def blocks(language: str) -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for found, body in FENCE.findall(text) if found == language]


def commands(first_word: str) -> list[str]:
    """Lines of the shell blocks in which `first_word` is the program that counts."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line]
    return [line for line in lines if line.split("|")[-1].split()[0] == first_word]


def run(command: list[str], folder: Path) -> str:
    result = subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def environment() -> dict[str, str]:
    """This interpreter's programs first, as in an activated environment."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_readme_has_what_is_tested() -> None:
    assert {"make demo", "make test"} <= set(commands("make"))
    assert len(commands("lowlat")) >= 5 and len(blocks("python")) == 2


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command: str) -> None:
    """What `make` would do, without doing it: the suite cannot run itself."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    plan = run([*shlex.split(command), "--dry-run"], ROOT)
    assert "lowlat" in plan or "pytest" in plan


def test_make_demo() -> None:
    if Path(sys.prefix) != ROOT / ".venv" or shutil.which("make") is None:
        pytest.skip("make demo uses .venv of the repository, and this is another environment")
    shown = run(["make", "demo"], ROOT)
    for words in ("Paris", "GQA", "MLA", "cache per token", "23,040", "tok/s"):
        assert words in shown


@pytest.mark.slow
def test_shell_commands(smollm_gguf: Path, tmp_path: Path) -> None:
    """All in one folder and in order: later commands use what earlier ones made."""
    (tmp_path / "notes.txt").write_text("The sea was calm, and the boats lay in the harbour.\n")
    for command in commands("lowlat"):
        shown = run(["bash", "-c", f"set -o pipefail; {command}"], tmp_path)
        assert shown.strip(), f"{command} printed nothing"
    assert (tmp_path / "smollm2-mla" / "config.json").is_file()


@pytest.mark.slow
def test_python_example(smollm_gguf: Path, tmp_path: Path) -> None:
    example, batches = blocks("python")
    shown = run([sys.executable, "-c", example], tmp_path)
    assert "Paris" in shown and "MLAConfig" in shown
    answer = run([sys.executable, "-c", batches], tmp_path).split("\n", 1)[1]
    assert set(json.loads(answer)) == {"city", "country"}
