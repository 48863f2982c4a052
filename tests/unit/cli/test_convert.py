"""lowlat convert: options reach the conversion and its report is printed."""

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lowlat.convert.run import Report
from lowlat.utils.errors import UserError
from lowlat.utils.progress import Progress

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
    ) -> Report:
        assert (src, to, dtype, file_format) == (Path("some.gguf"), "mla", "bf16", "hf")
        return Report(
            source=src,
            destination=dst,
            attention_before="GQA",
            attention_after="MLA",
            cache_bytes_per_token_before=1234,
            cache_bytes_per_token_after=567,
            parameters_before=89,
            parameters_after=98,
            weight_bytes_before=5_000_000,
            weight_bytes_after=20_000_000,
            bits_per_weight_before=4.5,
            bits_per_weight_after=16.0,
            seconds=1.5,
        )

    monkeypatch.setattr("lowlat.convert.run.convert", convert)
    monkeypatch.setattr("lowlat.api.prepare", lambda name, **options: Path("some.gguf"))
    result = lowlat(
        "convert", "some.gguf", str(tmp_path), "--to", "mla", "--dtype", "bf16", "--format", "hf"
    )
    assert result.exit_code == 0
    sizes = ("5.0 MB  ->  20.0 MB", "4.50  ->  16.00")
    for words in ("GQA  ->  MLA", "1,234  ->  567 bytes", "89  ->  98", "1.5 s", *sizes):
        assert words in result.stdout.replace("\n", " ")


def test_an_interruption_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, lowlat: Invoke, tmp_path: Path
) -> None:
    def convert(*arguments: object, **options: object) -> None:
        (tmp_path / ".out.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("lowlat.convert.run.convert", convert)
    monkeypatch.setattr("lowlat.api.prepare", lambda name, **options: Path("some"))
    result = lowlat("convert", "some", str(tmp_path / "out"), "--dtype", "bf16")
    assert result.exit_code != 0
    assert ".out.partial is kept, the same command goes on from there" in result.stderr


def test_a_missing_source_is_named(lowlat: Invoke, tmp_path: Path) -> None:
    result = lowlat("convert", str(tmp_path / "absent"), str(tmp_path / "out"), "--to", "mla")
    assert isinstance(result.exception, UserError)
    assert "absent" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
