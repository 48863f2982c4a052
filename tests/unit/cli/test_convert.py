"""lowlat convert: options reach the conversion and its report is printed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from lowlat.cli.options import parse_count
from lowlat.convert.options import RecoveryOptions
from lowlat.convert.report import ConversionReport
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

from .reports import conversion

Invoke = Callable[..., Result]


def test_report(monkeypatch: pytest.MonkeyPatch, lowlat: Invoke, tmp_path: Path) -> None:
    def convert(
        src: Path,
        dst: Path,
        *,
        to: str | None,
        dtype: str,
        file_format: str,
        progress: Progress,
        **more: object,
    ) -> ConversionReport:
        assert (src, to, dtype, file_format) == (Path("some.gguf"), "mla", "bf16", "hf")
        return conversion(src, dst)

    monkeypatch.setattr("lowlat.convert.run.convert", convert)
    monkeypatch.setattr("lowlat.api.prepare", lambda name, **options: Path("some.gguf"))
    options = ("--to", "mla", "--dtype", "bf16", "--format", "hf")
    result = lowlat("convert", "some.gguf", str(tmp_path / "out"), *options)
    assert result.exit_code == 0
    told = " ".join(result.stdout.split())  # a long path wraps
    sizes = ("5.0 MB -> 20.0 MB", "4.50 -> 16.00")
    for words in ("GQA -> MLA", "1,234 -> 567 bytes", "89 -> 98", "1.5 s", *sizes):
        assert words in told


def test_an_interruption_says_how_to_resume(
    monkeypatch: pytest.MonkeyPatch, lowlat: Invoke, tmp_path: Path
) -> None:
    def convert(*arguments: object, **options: object) -> None:
        (tmp_path / ".out.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("lowlat.convert.run.convert", convert)
    monkeypatch.setattr("lowlat.api.prepare", lambda name, **options: Path("some"))
    result = lowlat("convert", "some", str(tmp_path / "out"), "--dtype", "bf16")
    assert result.exit_code != 0
    assert "the same command resumes from" in result.stderr and ".out.partial" in result.stderr


def test_a_missing_source_is_named(lowlat: Invoke, tmp_path: Path) -> None:
    result = lowlat("convert", str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "mla")
    assert isinstance(result.exception, UserError)
    assert "absent" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_healing_gets_its_options(
    monkeypatch: pytest.MonkeyPatch, lowlat: Invoke, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def heal(src: Path, dst: Path, **options: Any) -> None:
        given.update(options)
        (tmp_path / ".out.conversion").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("lowlat.recovery.run.convert_with_recovery", heal)
    monkeypatch.setattr("lowlat.api.prepare", lambda name, **options: Path("some"))
    options = "--to mla --cache 0.5 --heal 1.5M --text a.txt --text b --evaluate c.txt --dtype bf16"
    result = lowlat("convert", "some", str(tmp_path / "out"), *options.split())
    assert given["recovery"] == RecoveryOptions(
        tokens=1_500_000, texts=("a.txt", "b"), evaluate=Path("c.txt")
    )
    assert (given["to"], given["dtype"], given["compression"].share) == ("mla", "bf16", 0.5)
    assert result.exit_code != 0
    assert "the same command resumes from" in result.stderr and ".out.conversion" in result.stderr


def test_a_smaller_cache_needs_a_form_to_convert_to(lowlat: Invoke, tmp_path: Path) -> None:
    result = lowlat("convert", "absent", str(tmp_path / "out"), "--cache", "0.5")
    assert isinstance(result.exception, UserError), result.output
    assert "--cache compresses" in str(result.exception) and "--to mla" in str(result.exception)


def test_a_recipe_needs_a_form_to_convert_to(lowlat: Invoke, tmp_path: Path) -> None:
    result = lowlat("convert", "absent", str(tmp_path / "out"), "--method", "exact")
    assert isinstance(result.exception, UserError), result.output
    assert "--method" in str(result.exception) and "add --to mla" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--heal 1M --text a", "--heal trains a model whose cache was compressed; add --cache"),
        ("--cache 0.5 --heal 1M", "--heal trains on text; add --text FILE_OR_FOLDER"),
        ("--cache 0.5 --text a", "--text needs --heal TOKENS"),
        ("--evaluate a", "--evaluate needs --cache SHARE"),
        ("--cache 0.5 --heal 1G --text a", "--heal '1G': write a number such as 500000"),
        ("--cache 0.5 --heal 0 --text a", "--heal '0': write a number"),
        ("--cache 0.5 --heal -5 --text a", "--heal '-5': write a number"),
        ("--cache 0.5 --heal 1M --text a --evaluate a", "is also given as --text"),
        ("--cache 0.5 --calibrate a --evaluate a", "is also given as --calibrate"),
        ("--cache 0.5 --method best", "--method 'best' is unknown"),
        ("--cache -0.5", "--cache -0.5: give the share of the cache to keep, above 0"),
        ("--cache 0", "--cache 0: give the share"),
        ("--cache 1", "--cache 1: give the share"),
        ("--cache nan", "--cache nan: give the share"),
        ("--dtype int2", "--dtype 'int2' is unknown"),
        ("--format zip", "--format 'zip' is unknown"),
    ],
)
def test_options_without_effect(lowlat: Invoke, tmp_path: Path, options: str, message: str) -> None:
    """Refused before the model is looked for."""
    arguments = ("absent", str(tmp_path / "out"), "--to", "mla", *options.split())
    result = lowlat("convert", *arguments)
    assert isinstance(result.exception, UserError), result.output
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_is_reported_before_the_model_is_looked_for(
    lowlat: Invoke, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    result = lowlat("convert", "absent", str(tmp_path / "out"), "--to", "mla")
    assert isinstance(result.exception, UserError), result.output
    assert "out: exists already" in str(result.exception)


@pytest.mark.parametrize(
    ("text", "number"),
    [("500000", 500_000), ("500K", 500_000), ("1.5m", 1_500_000), ("2B", 2 * 10**9), ("0.5K", 500)],
)
def test_counts(text: str, number: int) -> None:
    assert parse_count(text, "--heal") == number
