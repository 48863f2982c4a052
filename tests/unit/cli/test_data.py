"""lowlat data: options reach the build, tables and JSON tell what a folder holds."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lowlat.data.dataset import TokenizedDataset
from lowlat.utils.errors import UserError
from tests.fakes import byte_tokenizer

Invoke = Callable[..., Result]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a.txt", "b.txt", "c.md", "d.md"):
        (folder / name).write_text(f"{name}\n---\nof {name}\n---\nsame\n")
    return folder


def build(lowlat: Invoke, tmp_path: Path, *arguments: str) -> Result:
    return lowlat("data", "build", str(tmp_path / "tokens"), *arguments)


def test_build_info_verify(lowlat: Invoke, corpus: Path, tmp_path: Path) -> None:
    options = ["--train-bpe", "300", "--separator", "---", "--only", "*.txt"]
    held = ["--held-out-source", str(corpus / "d.md")]
    built = build(lowlat, tmp_path, str(corpus), *options, *held)
    assert built.exit_code == 0, built
    folder = TokenizedDataset.open(tmp_path / "tokens")
    assert folder.num_documents("train") == 4 and folder.num_documents("held_out") == 3
    told = " ".join(built.stdout.split())
    for words in ("held out 3", "train 4", "dropped 2 duplicate", "uint16 ids", "bytes per token"):
        assert words in told
    info = lowlat("data", "info", str(folder.path), "--json")
    raw = json.loads(info.stdout)
    assert raw["train"]["documents"] == 4 and raw["dropped"] == {"duplicate": 2}
    size, tokens = folder.num_bytes("train"), folder.num_tokens("train")
    assert raw["train"]["bytes_per_token"] == pytest.approx(size / tokens)
    assert "train" in lowlat("data", "info", str(folder.path)).stdout
    verified = lowlat("data", "verify", str(folder.path))
    assert folder.fingerprint in verified.stdout.replace("\n", "")
    (folder.path / "train-00000.bin").write_bytes(b"\0" * (2 * folder.num_tokens("train")))
    broken = lowlat("data", "verify", str(folder.path))
    assert isinstance(broken.exception, UserError) and "SHA-256" in str(broken.exception)


def test_build_as_json_with_a_tokenizer(lowlat: Invoke, corpus: Path, tmp_path: Path) -> None:
    build(lowlat, tmp_path, str(corpus), "--train-bpe", "300")
    target = str(tmp_path / "again")
    again = lowlat(
        "data", "build", target, str(corpus / "a.txt"), str(corpus / "c.md"),
        "--tokenizer", str(tmp_path / "tokens"), "--held-out", "0", "--json",
        "--end-of-text", "<|reserved_0|>",
    )  # fmt: skip
    raw = json.loads(again.stdout)
    assert raw["path"] == target and raw["train"]["documents"] == 2
    assert raw["sources"] == [str(corpus / "a.txt"), str(corpus / "c.md")]
    assert raw["end_of_text"] == 8 and raw["seconds"] > 0


def test_a_split_left_empty_is_reported(lowlat: Invoke, corpus: Path, tmp_path: Path) -> None:
    built = build(lowlat, tmp_path, str(corpus), "--train-bpe", "300", "--held-out", "0")
    assert "No document is held out" in built.stdout
    assert "smaller than the 300 requested" in built.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give either --tokenizer MODEL or --train-bpe N"),
        (["--train-bpe", "300", "--tokenizer", "x"], "give either --tokenizer MODEL or"),
        (["--train-bpe", "300", "--invalid", "pass"], "--invalid 'pass' is unknown; choose error"),
        (["--train-bpe", "7"], "--train-bpe 7: must be from"),
        (
            ["--train-bpe", "300", "--field", "foo"],
            "--field applies to JSON lines and tables, and no",
        ),
        (["--train-bpe", "300", "--held-out", "2"], "held-out share 2.0 must be"),
        (["--train-bpe", "300", "--end-of-text", "<x>"], "'<x>' is not a special token"),
    ],
)
def test_faults_are_one_line_and_leave_nothing(
    lowlat: Invoke, corpus: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    result = build(lowlat, tmp_path, str(corpus), *arguments)
    assert isinstance(result.exception, UserError)
    assert words in str(result.exception) and "\n" not in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("source", "option", "words"),
    [
        ("c.md", ("--only", "*.md"), "--only applies to folders, and no source is one"),
        (
            "x.jsonl",
            ("--separator", "X"),
            "--separator applies to text files, and no source is one",
        ),
    ],
)
def test_options_of_no_use_are_refused(
    lowlat: Invoke, corpus: Path, tmp_path: Path, source: str, option: tuple[str, str], words: str
) -> None:
    (corpus / "x.jsonl").write_text('{"text": "words"}\n' * 9)
    result = build(lowlat, tmp_path, str(corpus / source), "--train-bpe", "300", *option)
    assert isinstance(result.exception, UserError) and words in str(result.exception)
    both = build(lowlat, tmp_path, str(corpus), "--train-bpe", "300", *option)
    assert both.exit_code == 0, both.output


def test_sources_that_are_all_held_out_are_refused(
    lowlat: Invoke, corpus: Path, tmp_path: Path
) -> None:
    """Regression: a token folder without a document to train on."""
    held_out = ("--held-out-source", str(corpus), "--train-bpe", "300")
    result = build(lowlat, tmp_path, str(corpus), *held_out)
    assert isinstance(result.exception, UserError)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
    model = tmp_path / "model"
    byte_tokenizer().save(model)
    held_out = ("--held-out-source", str(corpus), "--tokenizer", str(model))
    result = build(lowlat, tmp_path, str(corpus), *held_out)
    assert "no document is left to train on, all are held out" in str(result.exception)


def test_bad_text_is_named_or_passed_over(lowlat: Invoke, corpus: Path, tmp_path: Path) -> None:
    (corpus / "b.txt").write_bytes(b"\xff")
    result = build(lowlat, tmp_path, str(corpus), "--train-bpe", "300")
    assert isinstance(result.exception, UserError)
    assert "b.txt: byte 0 is not UTF-8 text" in str(result.exception)
    result = build(lowlat, tmp_path, str(corpus), "--train-bpe", "300", "--invalid", "skip")
    assert "1 invalid" in result.stdout


@pytest.mark.slow
def test_prompts_of_reasoning_gym(lowlat: Invoke, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    options = ("--size", "2", "--config", '{"min_terms": 2, "max_terms": 2}', "--text")
    done = lowlat("data", "reasoning-gym", "chain_sum", str(path), *options)
    assert done.exit_code == 0 and "2 prompts" in done.stdout
    assert all(json.loads(line)["prompt"] for line in path.read_text().splitlines())


@pytest.mark.parametrize("config", ["[]", "{", '{"size": 3}'])
def test_settings_of_reasoning_gym(lowlat: Invoke, tmp_path: Path, config: str) -> None:
    path = tmp_path / "prompts.jsonl"
    done = lowlat("data", "reasoning-gym", "gcd", str(path), "--size", "2", "--config", config)
    assert isinstance(done.exception, UserError) and str(done.exception).startswith("--config: ")
    assert not path.exists()
