"""The command as a whole: exit codes, errors of one line, a quick start."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lowlat.cli.main import app
from tests import forked


def lowlat(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return forked.run(
        [sys.executable, "-m", "lowlat", *arguments], capture_output=True, text=True, timeout=600
    )


def shell(words: str) -> subprocess.CompletedProcess[str]:
    """The same from a shell, whose redirections `words` may have."""
    command = f"{sys.executable} -m lowlat {words}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)


def test_version() -> None:
    result = lowlat("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("lowlat ")


def test_help_lists_the_verbs() -> None:
    result = lowlat("--help")
    assert result.returncode == 0
    for verb in ("chat", "generate", "info", "convert", "eval"):
        assert verb in result.stdout


def test_a_fault_of_the_user_is_one_line_and_exit_code_2() -> None:
    result = lowlat("generate", "-p", "x", "--top-k", "5")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("lowlat: error: top_k")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("generate", "minnow"), ("'--prompt'", "generate --help")),
        (("chat", "--nonsense"), ("--nonsense", "chat --help")),
        (("fly",), ("'fly'", "--help")),
        (("generate", "-p", "x", "--max-tokens", "some"), ("'--max-tokens'", "integer")),
        (("data", "build", "out"), ("'SOURCE'", "data build --help")),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], told: tuple[str, ...]
) -> None:
    result = lowlat(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("lowlat: error: ")
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in told)


def test_without_words_the_help_is_shown() -> None:
    result = lowlat()
    assert result.returncode == 2
    assert "generate" in result.stdout
    assert result.stderr == ""


@pytest.mark.parametrize("arguments", [("--version",), ("--help",), ("generate", "--help")])
def test_start_does_not_wait_for_torch(arguments: tuple[str, ...]) -> None:
    """Regression: an import at the top of a verb's file makes every --help take seconds."""
    code = (
        "import sys\nfrom lowlat.cli.main import run\n"
        "try: run()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'tokenizers', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr


def test_interrupt_is_exit_code_130() -> None:
    code = (
        "import lowlat.cli.main as main\n"
        "def stop(): raise KeyboardInterrupt\n"
        "main.app.command('stop')(stop)\n"
        "main.run()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "stop"], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_interrupt_while_modules_are_read_is_exit_code_130() -> None:
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'lowlat.cli.bench': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Stop())\n"
        "from lowlat.__main__ import main\n"
        "main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=600
    )
    assert (result.returncode, result.stderr) == (130, "")


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "info deepseek-v3",
        pytest.param("info minnow --json", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("output", [">/dev/full", ">&-"])
def test_an_output_that_takes_nothing_is_one_line_and_exit_code_2(words: str, output: str) -> None:
    result = shell(f"{words} {output}")
    assert result.returncode == 2
    assert result.stderr.startswith("lowlat: error: standard output cannot be written (")
    assert result.stderr.count("\n") == 1


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    result = shell("info deepseek-v3 --json | true; exit ${PIPESTATUS[0]}")
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.slow
def test_figures_stand_on_a_line_of_their_own() -> None:
    """However output is buffered: in containers it mostly is not."""
    for buffering in ("", "PYTHONUNBUFFERED=1 "):
        command = (
            f"echo hello | {buffering}{sys.executable} -m lowlat chat minnow --max-tokens 3 2>&1"
        )
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=600)
        assert re.search(r"\n\d tokens", done.stdout), done.stdout


@pytest.mark.slow
def test_closed_input_is_empty_and_closed_error_takes_everything() -> None:
    result = shell("generate minnow -p - --max-tokens 2 <&-")
    assert result.returncode == 0 and "Traceback" not in result.stderr
    result = shell("info deepseek-v3 2>&-")
    assert result.returncode == 0
    assert "671" in result.stdout


def test_collections_are_as_usual_after_the_first() -> None:
    """Regression: a server or a training whose garbage waits for long."""
    program = """
import gc
from lowlat.cli.main import defer_garbage_collection
usual = gc.get_threshold()
defer_garbage_collection()
assert gc.get_threshold() > usual and gc.get_freeze_count() == 0
kept = [[] for _ in range(400_000)]
assert gc.get_threshold() == usual and gc.get_freeze_count() > 0
assert not gc.callbacks
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=600)


@pytest.mark.parametrize(("chosen", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
@pytest.mark.parametrize("words", [["train", "none.toml", "--dry-run"], ["convert", "none", "dst"]])
def test_openmp_threads_of_verbs_that_train_wait_passively(
    words: list[str], chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set before torch is imported and before any error of the verb; a value that is set stays."""
    monkeypatch.setenv("OMP_WAIT_POLICY", chosen or "")
    if chosen is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    CliRunner().invoke(app, words)
    assert os.environ["OMP_WAIT_POLICY"] == expected
