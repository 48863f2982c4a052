"""lowlat train report: what goes to stdout, where pictures go, and faults in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from lowlat.train.metrics import plot
from lowlat.train.metrics.jsonl import LogWriter
from lowlat.utils.errors import UserError
from tests.unit.train.metrics.records import evaluation, start, step

Invoke = Callable[..., Result]


def make_run(folder: Path, *, steps: int = 3) -> Path:
    folder.mkdir()
    writer = LogWriter(folder / "log.jsonl")
    writer.write(start())
    for number in range(1, steps + 1):
        writer.write(step(number, experts=()))
    if steps:
        writer.write(evaluation(steps))
    writer.close()
    return folder


def test_one_run_is_drawn_in_its_folder(lowlat: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "tiny")
    result = lowlat("train", "report", str(run))
    assert result.exit_code == 0, result.output
    assert "3 of 13" in result.stdout and "best held_out loss" in result.stdout
    assert result.stderr == f"wrote {run}/report.png, {run}/report.svg, {run}/report.json\n"
    assert {path.name for path in run.iterdir()} == {
        "log.jsonl",
        "report.json",
        "report.png",
        "report.svg",
    }


def test_json_is_all_there_is_on_stdout(lowlat: Invoke, tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    result = lowlat("train", "report", "--json", *map(str, runs))
    found = json.loads(result.stdout)
    assert list(found) == ["a", "b"] and found["a"]["tokens"] == 300
    assert result.stderr == "no plot of several runs without --out FILE\n"


def test_out_names_the_picture(lowlat: Invoke, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    result = lowlat("train", "report", *map(str, runs), "--out", str(tmp_path / "new" / "c.svg"))
    assert result.exit_code == 0, result.output
    assert "a: train" not in result.stdout
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["c.json", "c.svg"]
    assert result.stderr == f"wrote {tmp_path}/new/c.svg, {tmp_path}/new/c.json\n"
    figures = json.loads((tmp_path / "new" / "c.json").read_text())
    assert list(figures) == ["a", "b"] and figures["b"]["tokens"] == 300
    assert not (runs[0] / "report.png").exists()


def test_run_that_is_still_going(lowlat: Invoke, tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny")
    with open(run / "log.jsonl", "ab") as log:
        log.write(b'{"kind":"step","step":4,"pha')
    result = lowlat("train", "report", "--json", str(run / "log.jsonl"))
    assert json.loads(result.stdout)["tiny"]["step"] == 3


def test_without_matplotlib_there_is_a_table(
    lowlat: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "available", lambda: False)
    run = make_run(tmp_path / "tiny")
    result = lowlat("train", "report", str(run))
    assert result.exit_code == 0 and "3 of 13" in result.stdout
    assert result.stderr.startswith("no plot: matplotlib is not installed")
    asked = lowlat("train", "report", str(run), "--out", str(tmp_path / "a.png"))
    assert isinstance(asked.exception, UserError)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "log.jsonl: no such log; name the folder of a training run"),
        (b"", "log.jsonl: the log is empty"),
        (b"\x00\x01\n", "log.jsonl: line 1: not valid JSON"),
        (b"{}\n", "if this is not a training log, name a run folder"),
    ],
)
def test_faults_are_one_line(
    lowlat: Invoke, tmp_path: Path, content: bytes | None, fault: str
) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_bytes(content)
    result = lowlat("train", "report", str(tmp_path))
    assert isinstance(result.exception, UserError)
    assert fault in str(result.exception) and "\n" not in str(result.exception)


def test_no_step_yet(lowlat: Invoke, tmp_path: Path) -> None:
    run = make_run(tmp_path / "tiny", steps=0)
    result = lowlat("train", "report", str(run))
    assert isinstance(result.exception, UserError)
    assert "no step is done yet" in str(result.exception)


def test_wrong_ending_is_refused_before_anything(lowlat: Invoke, tmp_path: Path) -> None:
    result = lowlat("train", "report", str(tmp_path / "none"), "--out", "a.jpg")
    assert isinstance(result.exception, UserError)
    assert "--out a.jpg" in str(result.exception)
