"""Pictures of runs: what is drawn, and that no run is too short or too odd to be drawn."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from lowlat.train.metrics import plot, series
from lowlat.train.metrics.jsonl import LogWriter, RunHistory
from lowlat.train.metrics.record import Record, StepRecord
from lowlat.train.metrics.training_report import pictures, read_runs, write_report
from lowlat.utils.errors import UserError
from tests.unit.train.metrics.records import (
    evaluation,
    experts,
    grpo_step,
    held_out,
    layer,
    start,
    step,
)

pytest.importorskip("matplotlib")


def history(*records: Record) -> RunHistory:
    made = RunHistory(Path("run/log.jsonl"))
    for record in (start(), *records):
        made.add(record)
    return made


def steps(number: int, **changes: object) -> list[StepRecord]:
    return [step(n, **changes) for n in range(1, number + 1)]


def drawn_text(histories: dict[str, RunHistory], folder: Path) -> str:
    """The svg of a picture whose letters are kept as text."""
    import matplotlib

    path = folder / "a" / "picture.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot.draw(histories, [path])
    return path.read_text()


def test_one_run_in_full(tmp_path: Path) -> None:
    records = [*steps(9), *(step(n, phase="decay") for n in range(10, 30))]
    svg = drawn_text({"tiny": history(*records, evaluation(7), evaluation(13))}, tmp_path)
    for text in (
        "tiny: step 29 of 13, 2,900 tokens",
        "loss, nats per token",
        "train, MTP module 1",
        "held_out",
        "main",
        "decay",
        "learning rate",
        "gradient norm before clipping",
        "tokens per second",
        "MFU, % of measured matrix products",
        "batch, tokens per step",
        "MaxVio = largest load / mean - 1",
        "routing bias, smallest and largest",
        "layer 3: load of experts",
        "load / mean load",
    ):
        assert f">{text}<" in svg or f"> {text}<" in svg, text


def test_several_runs_in_one_picture(tmp_path: Path) -> None:
    runs = {
        "moe": history(*steps(7), evaluation(3)),
        "dense": history(*steps(5, experts=(), mtp_losses=(), mfu=None)),
    }
    svg = drawn_text(runs, tmp_path)
    for text in ("2 runs compared", "moe: train", "moe: held_out", "dense: train", "tokens"):
        assert f">{text}<" in svg, text
    assert "load of experts" not in svg


def test_a_grpo_run_has_panels_of_its_own(tmp_path: Path) -> None:
    records = [grpo_step(1), grpo_step(2, kl=None, reward=math.nan), held_out(1, 0.5)]
    alone = drawn_text({"rl": history(*records)}, tmp_path)
    panels = (
        "mean reward",
        "pass@k on held-out prompts",
        "pass@8",
        "deviation of rewards",
        "tokens per completion",
        "truncated completions, %",
        "groups without signal, %",
        "entropy, nats per token",
        "KL from the reference, nats per token",
        "clipped tokens, %",
        "sampled tokens per second",
    )
    for text in panels:
        assert f">{text}<" in alone, text
    assert "loss, nats per token" not in alone
    both = {"rl": history(*records), "sft": history(*steps(3))}
    compared = drawn_text(both, tmp_path)
    for text in ("loss, nats per token", "mean reward", "rl: pass@1"):
        assert f">{text}<" in compared, text
    assert "pass@8" not in compared and "deviation of rewards" not in compared


ODD_RUNS = [
    steps(1),
    steps(1, experts=(), mtp_losses=(), mfu=None),
    steps(5, loss=math.nan, grad_norm=math.inf, mtp_losses=(math.nan,), experts=experts(1)),
    steps(5, grad_norm=0.0, learning_rate=0.0, experts=(layer(1, [1, 0]),)),
    [step(1, experts=()), step(2, experts=experts(1))],
    [step(1, experts=experts(2)), step(2, experts=experts(1), mtp_losses=(1.0, 2.0))],
    [step(n, experts=(dataclasses.replace(layer(1, [1, 2]), load=()),)) for n in (1, 2)],
]


@pytest.mark.slow
@pytest.mark.parametrize("records", ODD_RUNS)
def test_odd_runs_are_drawn(records: list[StepRecord], tmp_path: Path) -> None:
    """Regression: a picture that fails, or warns, for a run that just began or went astray."""
    made = history(*records, evaluation(1, loss=records[0].loss))
    plot.draw({"tiny": made}, [tmp_path / "a.png"])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_odd_runs_are_compared(tmp_path: Path) -> None:
    runs = {f"run {place}": history(*records) for place, records in enumerate(ODD_RUNS)}
    plot.draw(runs, [tmp_path / "a.png"])
    assert (tmp_path / "a.png").stat().st_size > 10_000


@pytest.mark.slow
def test_same_run_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot.draw({"tiny": history(*steps(5, experts=experts(1)))}, [tmp_path / name])
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_report_is_next_to_the_log(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log.jsonl")
    for record in (start(), *steps(3)):
        writer.write(record)
    writer.close()
    [made] = read_runs([tmp_path]).values()
    names = ["report.png", "report.svg", "report.json"]
    assert write_report(made) == [tmp_path / name for name in names]
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "report.svg").read_text()
    assert '"tokens": 300' in (tmp_path / "report.json").read_text()


def test_names_of_pictures() -> None:
    assert pictures(Path("a/b")) == [Path("a/b.png"), Path("a/b.svg")]
    assert pictures(Path("b.PDF")) == [Path("b.PDF")]
    with pytest.raises(UserError, match=r"--out a\.jpg: must end in \.png, \.svg, \.pdf"):
        pictures(Path("a.jpg"))


def test_labels_distinguish_runs(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name).mkdir(parents=True)
        writer = LogWriter(tmp_path / name / "log.jsonl")
        writer.write(start())
        writer.close()
    labels = list(read_runs([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c/log.jsonl"]))
    assert labels == [str(tmp_path / "a/run"), str(tmp_path / "b/run"), "c"]
    with pytest.raises(UserError, match="named twice"):
        read_runs([tmp_path / "c", tmp_path / "c"])


def test_smoothing_leaves_out_what_is_not_finite() -> None:
    values = np.arange(200.0)
    values[100] = np.nan
    mean = series.smoothed(values)
    assert mean[50] == pytest.approx(50.0)  # 48 to 52
    assert mean[100] == pytest.approx(100.0)
    assert mean[0] == pytest.approx(1.0)  # 0 to 2
    assert np.isnan(series.smoothed(np.full(3, np.nan))).all()
    values[150] = 1e9
    assert series.medians(values)[150] == pytest.approx(151.0)  # 148, 149, 151, 152, 1e9


def test_thinned_curves_keep_their_last_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MOST_POINTS", 7)
    x = np.arange(101.0)
    [kept] = series.thinned(x)
    assert len(kept) <= 7 and kept[-1] == 100.0
    assert len(series.medians(x)) == len(kept)
    assert list(series.thinned(x[:7])[0]) == list(x[:7])


def test_map_of_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MOST_STRETCHES", 2)
    records = [
        step(1, experts=(layer(5, [3, 1]),)),
        step(2, experts=(layer(5, [1, 1]),)),
        step(3, experts=(dataclasses.replace(layer(5, [1, 3]), load=()),)),
        step(4, experts=(layer(5, [1, 3]),)),
    ]
    [found] = series.load_maps(history(*records), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found.layer == 5
    assert found.relative == pytest.approx(np.array([[1.25, 0.5], [0.75, 1.5]]))
    assert list(found.edges) == [1.0, 4.0, 5.0]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(plot, "available", lambda: False)
    with pytest.raises(UserError, match=r"pip install lowlat\[train\]"):
        plot.draw({"tiny": history(*steps(1))}, [tmp_path / "a.png"])


def test_picture_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a.png: the plot cannot be written"):
        plot.draw({"tiny": history(*steps(1))}, [tmp_path / "file" / "a.png"])
