"""What someone who waits sees, on terminals and in pipes; stdout stays empty."""

import io
import re
import sys

import pytest
from rich.console import Console

from lowlat.train.metrics.live_view import LiveView, make_view
from lowlat.train.metrics.metrics_log import SilentMetricsLog
from lowlat.train.metrics.progress_view import PlainView
from tests.terminal import attach_terminal
from tests.unit.train.metrics.records import evaluation, experts, grpo_step, held_out, start, step


def drawn(view: LiveView, columns: int = 100) -> list[str]:
    """What the view draws now, line by line."""
    console = Console(file=io.StringIO(), width=columns, color_system=None)
    console.print(view._draw())
    return console.file.getvalue().rstrip("\n").split("\n")  # type: ignore[attr-defined]


def test_kind_follows_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    attach_terminal(monkeypatch)
    assert isinstance(make_view(), LiveView)
    assert isinstance(make_view(quiet=True), SilentMetricsLog)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_view(), PlainView)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(make_view(), PlainView)
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(make_view(), SilentMetricsLog)


def test_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(seconds=3600.0)
    view.start(start())
    for number in (1, 2, 3):
        view.step(step(number))
    view.status("evaluating")
    view.evaluation(evaluation(3))
    view.evaluation(evaluation(3, bits_per_byte=None, targets="answer token"))
    view.evaluation(held_out(3, 0.25))
    view.note("saved [3]")
    view.close()
    view.close()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "tiny: 13 steps, 1,300 tokens, parameters 12.3K, device cpu",
        "step 1/13  loss 7.0000  mtp 8.0000  lr 3.00e-04  grad 1.50  12.5 tok/s  MFU 43 %  "
        "1.23 GB  MaxVio 0.47 (layer 3)  1:36 left",
        "step 3: held_out loss 4.1667 (1.250 bits/byte), mtp 3.5000",
        "step 3: held_out loss 4.1667 per answer token, mtp 3.5000",
        "step 3: held_out_prompts pass@1 0.2500, pass@8 0.7500",
        "saved [3]",
        "step 3/13  loss 4.9397  mtp 4.6667  lr 3.00e-04  grad 1.50  12.5 tok/s  MFU 43 %  "
        "1.23 GB  MaxVio 0.47 (layer 3)  1:40 left",
    ]


def test_plain_line_of_the_last_step_comes_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(seconds=3600.0)
    view.start(start(11))
    for number in (12, 13):
        view.step(step(number, mfu=None, experts=(), mtp_losses=()))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("tiny: from step 11, 13 steps")
    assert [line.split("  ")[0] for line in lines[1:]] == ["step 12/13", "step 13/13"]
    assert "MFU" not in lines[1] and "MaxVio" not in lines[1] and "mtp" not in lines[1]


def test_live_area(monkeypatch: pytest.MonkeyPatch) -> None:
    attach_terminal(monkeypatch)
    view = LiveView()
    view.start(start())
    assert re.search(r"tiny .* 0/13 steps {2}0:00 spent, \? left", drawn(view)[0])
    view.step(step(1))
    view.step(step(2))
    view.evaluation(evaluation(2))
    view.status("evaluating")
    progress, losses, speed, head, *layers = drawn(view)
    view.close()
    assert re.search(r"2/13 steps {2}0:20 spent, 1:50 left \(evaluating\)", progress)
    assert losses.startswith("loss 5.6842  mtp 5.500  |  held_out loss 5.0000 (1.250 bits/byte)")
    assert losses.rstrip().endswith("at step 2")
    assert speed.startswith("12.5 tok/s  MFU 43 %  200 of 1,300 tokens  1.23 GB  lr 3.00e-04")
    assert head.split() == ["layer", "load", "MaxVio", "entropy", "bias"]
    assert [line.split()[0] for line in layers] == ["1", "2", "3"]
    assert re.search(r"[▁-█]{7} +0\.47 +0\.97\d +-0\.030 to \+0\.060", layers[2])


def test_live_area_of_grpo(monkeypatch: pytest.MonkeyPatch) -> None:
    attach_terminal(monkeypatch)
    view = LiveView()
    view.start(start())
    view.step(grpo_step(3))
    view.evaluation(held_out(2, 0.25))
    _, figures, passes, *_ = drawn(view)
    view.close()
    assert figures.split("  ") == [
        "reward 0.0300",
        "length 97.0",
        "entropy 1.5000",
        "KL 0.0312",
        "clipped 0.0625",
        "no signal 0.5000",
    ]
    assert passes.rstrip() == "held_out_prompts pass@1 0.2500, pass@8 0.7500 at step 2"


@pytest.mark.parametrize("columns", [60, 80, 140])
def test_live_area_fits_the_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Regression: a model of many layers whose lines scroll off and garble the screen."""
    attach_terminal(monkeypatch, columns=columns)
    view = LiveView()
    view.start(start(name="a-name-much-longer-than-fits-beside-the-bar-and-its-figures"))
    view.step(step(1, experts=experts(58, 257), mtp_losses=(1.0,) * 9))
    lines = drawn(view, columns)
    view.close()
    assert len(lines) < 24 and max(map(len, lines)) <= columns
    # The least even layers are shown, in order.
    assert [line.split()[0] for line in lines[4:]] == [str(n) for n in range(44, 59)]
    assert "load, 15 of 58" in lines[3] and "MaxVio" in lines[3]


def test_live_view_leaves_stdout_alone_and_the_terminal_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = attach_terminal(monkeypatch)
    view = LiveView()
    view.note("before")
    view.start(start())
    view.step(step(1))
    print("on stdout")
    view.note("a note [bold]that stays[/bold] :smile:")
    print("a warning from elsewhere", file=sys.stderr)
    view.close()
    view.close()
    text = fake.getvalue()
    assert capsys.readouterr().out == "on stdout\n"
    assert text.startswith("before\n")
    assert "a note [bold]that stays[/bold] :smile:\n" in text
    assert "a warning from elsewhere\n" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # cursor hidden and back
    assert sys.stderr is fake


def test_silent_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    view = SilentMetricsLog()
    view.start(start())
    view.step(step(1))
    view.evaluation(evaluation(1))
    view.note("a")
    view.status("b")
    view.close()
    assert capsys.readouterr() == ("", "")
