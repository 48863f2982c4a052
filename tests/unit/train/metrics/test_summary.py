"""The figures of a report, against runs small enough to reckon by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowlat.train.metrics.jsonl import RunHistory
from lowlat.train.metrics.lines import plain
from lowlat.train.metrics.record import Record
from lowlat.train.metrics.summary import summarise
from lowlat.train.metrics.training_report import table
from lowlat.utils.errors import UserError
from tests.unit.train.metrics.records import evaluation, grpo_step, held_out, layer, start, step


def history(*records: Record) -> RunHistory:
    made = RunHistory(Path("run/log.jsonl"))
    for record in records:
        made.add(record)
    return made


def shown(**summaries: Any) -> list[str]:
    """The table as lines without rulers."""
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(table(summaries))
    return [line.rstrip() for line in capture.get().splitlines() if "─" not in line]


def test_figures_of_a_run() -> None:
    steps = [
        step(n, loss=10.0 / n, tokens_per_second=10.0 + n, experts=(layer(4, [1, n]),))
        for n in range(1, 60)
    ]
    summary = summarise(
        history(
            start(total_steps=60),
            *steps,
            evaluation(20, loss=3.0, bits_per_byte=1.5),
            evaluation(40, loss=2.0, bits_per_byte=1.0),
            evaluation(59, loss=2.5, bits_per_byte=1.25),
            evaluation(59, split="train", loss=1.0, bits_per_byte=None),
        )
    )
    assert summary["mean_of_steps"] == 2  # a twentieth of 59
    assert summary["loss"] == pytest.approx((10 / 58 + 10 / 59) / 2)
    assert summary["mtp_losses"] == pytest.approx([3 + (5 / 58 + 5 / 59) / 2])
    assert summary["evaluations"]["held_out"]["best"] == {
        "step": 40,
        "loss": 2.0,
        "bits_per_byte": 1.0,
        "mtp_losses": (3.5,),
        "divergence": None,
        "targets": None,
        "pass_at_k": None,
    }
    assert summary["evaluations"]["held_out"]["last"]["step"] == 59
    assert summary["evaluations"]["train"]["best"]["loss"] == 1.0
    assert (summary["step"], summary["total_steps"], summary["finished"]) == (59, 60, False)
    assert (summary["tokens"], summary["seconds"]) == (5900, 590.0)
    assert summary["tokens_per_second"] == 40.0  # the median
    assert summary["tokens_per_second_overall"] == 10.0
    assert summary["experts"][0]["layer"] == 4
    assert summary["experts"][0]["max_violation_first"] == pytest.approx(0.0)
    assert summary["experts"][0]["max_violation_highest"] == pytest.approx(2 * 59 / 60 - 1)
    last = (2 * 58 / 59 - 1 + 2 * 59 / 60 - 1) / 2
    assert summary["experts"][0]["max_violation_last"] == pytest.approx(last)


def test_layers_are_found_wherever_they_are() -> None:
    """Regression: no figures of experts where the first phase matches attention, and those of other
    layers where steps differ in which they have.
    """
    steps = [
        step(1, experts=()),
        step(2, experts=(layer(4, [1, 3]),)),
        step(3, experts=(layer(2, [1, 1]), layer(4, [1, 1]))),
        step(4, experts=()),
    ]
    two, four = summarise(history(start(), *steps))["experts"]
    assert (two["layer"], four["layer"]) == (2, 4)
    assert two["max_violation_first"] == two["max_violation_highest"] == pytest.approx(0.0)
    assert four["max_violation_first"] == four["max_violation_highest"] == pytest.approx(0.5)
    assert four["max_violation_last"] == pytest.approx(0.0)


def test_steps_with_fewer_modules_count_where_they_have_them() -> None:
    steps = [step(n, mtp_losses=(4.0, 5.0)[: n % 2 + 1]) for n in range(1, 41)]
    assert summarise(history(start(), *steps))["mtp_losses"] == [4.0, 5.0]


def test_superseded_steps_do_not_count() -> None:
    summary = summarise(
        history(start(), step(1), step(2, loss=99.0), step(3, loss=99.0), start(1), step(2))
    )
    assert (summary["step"], summary["loss"]) == (2, 4.5)
    assert (summary["runs"], summary["superseded_steps"]) == (2, 2)


def test_loss_that_is_no_number_is_never_the_best_and_stays_json() -> None:
    summary = summarise(
        history(
            start(),
            step(1, loss=math.nan),
            evaluation(1, loss=math.nan),
            evaluation(2, loss=3.0),
            evaluation(3, loss=math.nan),
        )
    )
    assert summary["evaluations"]["held_out"]["best"]["step"] == 2
    assert json.loads(json.dumps(plain(summary), allow_nan=False))["loss"] == "NaN"


def test_the_best_evaluation_on_prompts_passes_most() -> None:
    records = [held_out(1, 0.5), held_out(2, 0.625), held_out(3, 0.25)]
    summary = summarise(history(start(), step(3), *records))
    rows = {" ".join(line.split()) for line in shown(tiny=summary)}
    assert {"best held_out_prompts pass@1 0.6250", "at step 2"} <= rows
    assert "best held_out_prompts pass@8 0.7500" in rows


def test_rollouts_at_the_first_step_and_at_the_end() -> None:
    steps = [grpo_step(n, kl=None if n < 3 else 0.25) for n in range(1, 41)]
    summary = summarise(history(start(), step(1), *steps))
    assert summary["rollouts"]["reward_first"] == 0.01
    assert summary["rollouts"]["reward_last"] == pytest.approx((0.39 + 0.40) / 2)
    assert (summary["rollouts"]["kl_first"], summary["rollouts"]["kl_last"]) == (None, 0.25)
    rows = {
        " ".join(line.split())
        for line in shown(tiny=summary, other=summarise(history(start(), step(1))))
    }
    assert "tokens per completion 99 -> 60.5" in rows
    assert summarise(history(start(), step(1)))["rollouts"] == {}


def test_tokens_of_grpo_are_those_of_prompts_and_completions() -> None:
    steps = [replace(grpo_step(n), batch_tokens=20 * n) for n in range(1, 4)]
    summary = summarise(history(start(), *steps))
    assert (summary["tokens"], summary["tokens_total"]) == (120, None)
    assert summary["tokens_per_second_overall"] == 120 / 30
    assert "tokens 120" in {" ".join(line.split()) for line in shown(tiny=summary)}


def test_no_step_yet() -> None:
    with pytest.raises(UserError, match=r"run/log.jsonl: no step is done yet"):
        summarise(history(start()))


def test_table_of_one_run() -> None:
    summary = summarise(history(start(), step(1), evaluation(1, loss=4.0), step(13)))
    rows = [line.split("  ") for line in shown(tiny=summary)]
    figures = {row[0] or row[0:2][-1]: row[-1].strip() for row in rows}
    assert figures["steps"] == "13 of 13"
    assert figures["tokens"] == "1,300 of 1,300"
    assert figures["time"] == "2:10"
    assert figures["loss at the end"] == "2.3846"
    assert figures["best held_out loss"] == "4.0000"
    assert figures["bits per byte"] == "1.2500"
    assert figures["speed of steps"] == "12.5 tok/s"
    assert figures["MFU"] == "43 %"
    assert figures["MaxVio, mean of layers"] == "0.36 -> 0.36"
    assert figures["worst layer"] == "0.47 -> 0.47"
    assert figures["highest in between"] == "0.47"
    assert "times started" not in figures


def test_more_than_all_products_is_remarked_on() -> None:
    """Regression: an MFU above 100 %, of a rate measured while the machine was busy, as a fact."""
    lines = shown(tiny=summarise(history(start(), step(1, mfu=1.3))))
    assert any("130 % (rate measured while busy)" in line for line in lines)


def test_table_of_different_runs_leaves_cells_empty() -> None:
    moe = summarise(history(start(), step(1), evaluation(1, bits_per_byte=None), start(1), step(2)))
    dense = summarise(history(start(), step(1, experts=(), mtp_losses=(), mfu=None)))
    lines = shown(moe=moe, dense=dense)
    assert lines[0].split() == ["moe", "dense"]
    by_name = {line[:24].strip(): line[24:].split() for line in lines[1:]}
    assert by_name["times started"] == ["2"]
    assert by_name["best held_out loss"] == ["7.5000"]
    assert by_name["MFU"] == ["43", "%"]
    assert "bits per byte" not in by_name  # no run knows it
