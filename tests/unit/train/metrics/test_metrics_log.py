"""The one object a trainer talks to: log, TensorBoard files and view get what they should."""

import json
from pathlib import Path

import pytest

from lowlat.train.checkpoints.run_folder import RunFolder
from lowlat.train.metrics import metrics_log, tensorboard
from lowlat.train.metrics.jsonl import read_log
from lowlat.train.metrics.lines import encode
from lowlat.train.metrics.metrics_log import FolderMetricsLog, MetricsLog
from lowlat.train.metrics.progress_view import PlainView
from lowlat.utils.errors import UserError
from tests.unit.train.metrics.records import evaluation, layer, start, step


def open_log(folder: Path, *, tensorboard_wanted: bool | None = False) -> FolderMetricsLog:
    return FolderMetricsLog(
        RunFolder(folder),
        view=PlainView(),
        tensorboard_wanted=tensorboard_wanted,
    )


def begin(log: MetricsLog, number: int = 0) -> None:
    log.start(start(number, facts={"parameters": 12_345}))


def test_records_reach_log_and_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = open_log(tmp_path)
    begin(log)
    log.step(step(1))
    log.status("evaluating")
    log.evaluation(evaluation(1))
    log.note("two\nlines")
    log.close()
    log.close()
    history = read_log(tmp_path / "log.jsonl")
    assert history.start.facts == {"parameters": 12_345}
    assert [record.step for record in history.steps] == [1]
    assert history.evaluations == [evaluation(1)]
    assert [(note.step, note.text) for note in history.notes] == [(1, "two lines")]
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "tiny:",
        "step",
        "step",
        "two",
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_loads_are_kept_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: records of every second step that never meet a multiple of the interval, and
    resumed runs without a load for long.
    """
    monkeypatch.setattr(metrics_log, "LOADS_EVERY", 3)
    log = open_log(tmp_path)
    begin(log)
    for number in (2, 4, 6, 8):
        log.step(step(number, experts=(layer(1, [1, 3]),)))
    log.close()
    steps = read_log(tmp_path / "log.jsonl").steps
    assert [bool(record.experts[0].load) for record in steps] == [True, False, True, False]
    assert {record.experts[0].max_violation for record in steps} == {0.5}


def test_torn_line_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.jsonl").write_bytes(encode(start()) + encode(step(1)) + b'{"kind":"st')
    log = open_log(tmp_path)
    begin(log, 1)
    log.close()
    assert "removed a torn last line of 11 bytes" in capsys.readouterr().err
    history = read_log(tmp_path / "log.jsonl")
    assert "removed a torn last line" in history.notes[0].text
    assert [record.step for record in history.steps] == [1]


def test_note_may_come_before_the_start(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.note("a save was skipped")
    begin(log)
    log.step(step(1))
    log.close()
    history = read_log(tmp_path / "log.jsonl")
    assert [note.text for note in history.notes] == ["a save was skipped"]


def test_without_tensorboard_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "available", lambda: False)
    log = open_log(tmp_path, tensorboard_wanted=None)
    begin(log)
    log.step(step(1))
    log.evaluation(evaluation(1))
    log.close()
    assert capsys.readouterr().err.count("tensorboard is not installed") == 1
    with pytest.raises(UserError, match=r"pip install lowlat\[train\]"):
        open_log(tmp_path, tensorboard_wanted=True)


def test_log_is_plain_json_for_others(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    begin(log)
    log.step(step(1))
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["start", "step"]
    assert rows[1]["loss"] == 7.0 and rows[1]["experts"][0]["layer"] == 1
