"""`lowlat-lab study rewards`: GRPO with several seeds, ablation of the trainer's arithmetic."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lowlat.cli.main import wait_passively
from lowlat.utils.errors import UserError
from lowlat_lab.cli.processors import use_processors

if TYPE_CHECKING:
    from lowlat_lab.rewards.report import Report
    from lowlat_lab.study.resumable import RunResult

Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder of the runs, FOLDER/EXPERIMENT/VARIANT/seed-N; the same command resumes.",
        show_default=False,
    ),
]
Names = Annotated[
    str | None,
    typer.Option(metavar="NAME,...", help="Experiments, MODEL-TASK; default: all."),
]
GSM8K = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Folder with gsm8k-train.jsonl and gsm8k-test.jsonl."),
]
AtMost = Annotated[
    int | None,
    typer.Option(
        "--at-most",
        metavar="N",
        min=0,
        help="Train N missing runs at most; 0: only report the finished ones.",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Threads; default: all.", show_default=False)
]
Idle = Annotated[
    bool, typer.Option("--idle", help="Use idle processor time only (start it with setsid).")
]
Page = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the page FILE.md with its plot and report."),
]


def rewards(
    *,
    out: Out,
    experiments: Names = None,
    gsm8k: GSM8K = None,
    at_most: AtMost = None,
    threads: Threads = None,
    idle: Idle = False,
    page: Page = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """GRPO on small models: held-out pass@1 over steps with confidence over seeds, and an ablation.

    The ablation trains with transformers' forward pass instead of the engine's kernels, with and
    without truncated importance sampling.
    """
    wait_passively()
    from lowlat_lab.rewards.page import write_page
    from lowlat_lab.rewards.plan import EXPERIMENTS, choose_experiments
    from lowlat_lab.rewards.report import make_report
    from lowlat_lab.study.page import check_page
    from lowlat_lab.study.plot import require_matplotlib

    choose_experiments(experiments)
    if page is not None:
        if page.suffix != ".md":
            raise UserError(f"--page {page}: give a file that ends in .md")
        require_matplotlib()
        check_page(page, "--page")
    use_processors(threads, idle=idle)
    ran = _run(out.resolve(), experiments, gsm8k, at_most, quiet=quiet)
    report = make_report(EXPERIMENTS, ran)
    _show(report)
    if page is not None:
        print(f"wrote {', '.join(map(str, write_page(report, page)))}", file=sys.stderr)
    if report["failures"]:
        raise typer.Exit(1)


def _run(
    out: Path, experiments: str | None, gsm8k: Path | None, limit: int | None, *, quiet: bool
) -> "Sequence[RunResult]":
    """Run up to `limit` missing runs of the chosen experiments; read the finished ones of all."""
    from lowlat.utils.progress import make_progress
    from lowlat_lab.rewards.plan import EXPERIMENTS, choose_experiments
    from lowlat_lab.rewards.run import study_runs
    from lowlat_lab.study.resumable import run_missing

    chosen = choose_experiments(experiments)
    others = [each for each in EXPERIMENTS if each not in chosen]
    progress, found = make_progress(quiet=quiet), []
    for group, most in ((chosen, limit), (others, 0)):
        runs = [run for each in group for run in study_runs(each, out, gsm8k)]
        found += run_missing("rewards study", runs, most, progress)
    return found


def _show(report: "Report") -> None:
    for entry in report["experiments"]:
        for each in entry["variants"]:
            done = f"{len(each['runs'])} of {entry['seeds']} runs are finished"
            print(f"{entry['name']}, {each['name']}: {done}", file=sys.stderr)
