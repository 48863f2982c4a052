"""`lowlat study`: small trainings that differ in one thing, with the confidence of what they show.

Owns arguments and output; arms, runs and figures are `lowlat_lab.study`'s.
"""

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowlat.cli import options
from lowlat.cli.main import wait_passively
from lowlat.utils.errors import UserError

if TYPE_CHECKING:
    from lowlat.data.dataset import TokenizedDataset
    from lowlat.utils.progress import Progress
    from lowlat_lab.study.plan import Arm, Plan
    from lowlat_lab.study.sizes import Size

Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="TOKENS",
        help="Token folder made by lowlat data build, with documents held out.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Where the runs go, FOLDER/ARM/seed-N. Started again, what is done there is kept.",
        show_default=False,
    ),
]
Seeds = Annotated[int, typer.Option(metavar="N", min=1, help="Runs of every arm: seeds 1 to N.")]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Optimiser steps of a run; the size's own by default.",
        show_default=False,
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="The same in tokens of a run.", show_default=False),
]
SizeName = Annotated[str, typer.Option("--size", help="Of the models: tiny, small or medium.")]
Arms = Annotated[
    str | None,
    typer.Option(
        metavar="ARM,...", help="Run these arms only, the first one included.", show_default=False
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Also write the page FILE.md with its picture and figures.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show arms, parameters and the time it will take.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]

app = typer.Typer(
    help="Compare forms of attention, ways of balancing, MTP: small trainings, several seeds.",
    no_args_is_help=True,
)


@dataclass(frozen=True, slots=True)
class _Output:
    """Where results go and in which form."""

    out: Path
    page: Path | None
    dry_run: bool
    as_json: bool
    quiet: bool


@app.command("attention")
def attention(
    data: Data,
    out: Out,
    seeds: Seeds = 3,
    steps: Steps = None,
    tokens: Tokens = None,
    size: SizeName = "small",
    arms: Arms = None,
    page: Page = None,
    dry_run: DryRun = False,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """MHA, GQA, MQA, MLA, GLA, GTA and TPA at one number of parameters.

    Held-out loss with its confidence, cache per token, decode speed at a long context.
    """
    wait_passively()
    from lowlat_lab.study import attention as own

    def all_arms(chosen: "Size", folder: "TokenizedDataset") -> "Sequence[Arm]":
        found = own.attention_arms(chosen, folder.vocab_size)
        return found if arms else own.usual(found)

    plan, folder = _plan("attention", data, seeds, steps, tokens, size, arms, all_arms)
    _study(own.study, plan, folder, _Output(out, page, dry_run, as_json, quiet))


@app.command("balance")
def balance(
    data: Data,
    out: Out,
    seeds: Seeds = 3,
    steps: Steps = None,
    tokens: Tokens = None,
    size: SizeName = "small",
    arms: Arms = None,
    page: Page = None,
    dry_run: DryRun = False,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """Experts balanced by a routing bias, by an auxiliary loss, by nothing: loss and MaxVio."""
    wait_passively()
    from lowlat_lab.study import balance as own

    plan, folder = _plan(
        "balance",
        data,
        seeds,
        steps,
        tokens,
        size,
        arms,
        lambda chosen, _: own.balance_arms(chosen),
    )
    _study(own.study, plan, folder, _Output(out, page, dry_run, as_json, quiet))


@app.command("mtp")
def mtp(
    data: Data,
    out: Out,
    seeds: Seeds = 3,
    steps: Steps = None,
    tokens: Tokens = None,
    size: SizeName = "small",
    page: Page = None,
    dry_run: DryRun = False,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """One model trained with a multi-token prediction module and without: loss, drafts kept."""
    wait_passively()
    from lowlat_lab.study import mtp as own

    def all_arms(chosen: "Size", _folder: "TokenizedDataset") -> "Sequence[Arm]":
        return own.mtp_arms(chosen)

    plan, folder = _plan("mtp", data, seeds, steps, tokens, size, None, all_arms)
    _study(own.study, plan, folder, _Output(out, page, dry_run, as_json, quiet))


@app.command("precision")
def precision(
    data: Data,
    out: Out,
    seeds: Seeds = 3,
    steps: Steps = None,
    tokens: Tokens = None,
    size: SizeName = "small",
    arms: Arms = None,
    page: Page = None,
    dry_run: DryRun = False,
    as_json: options.Json = False,
    quiet: Quiet = False,
) -> None:
    """One model trained in bf16, in DeepSeek-V3's FP8 and in fp32: loss beside bf16's."""
    wait_passively()
    from lowlat_lab.study import precision as own

    def all_arms(chosen: "Size", _folder: "TokenizedDataset") -> "Sequence[Arm]":
        return own.precision_arms(chosen)

    plan, folder = _plan("precision", data, seeds, steps, tokens, size, arms, all_arms)
    _study(own.study, plan, folder, _Output(out, page, dry_run, as_json, quiet))


def _plan(
    kind: str,
    data: Path,
    seeds: int,
    steps: int | None,
    tokens: int | None,
    size: str,
    arms: str | None,
    all_arms: "Callable[[Size, TokenizedDataset], Sequence[Arm]]",
) -> "tuple[Plan, TokenizedDataset]":
    from lowlat_lab.study.plan import Plan, choose_arms, num_steps, open_data
    from lowlat_lab.study.sizes import find_size

    chosen = find_size(size)
    folder = open_data(data, chosen)
    plan = Plan(
        kind=kind,
        data=folder.path,
        size=chosen,
        steps=num_steps(chosen, steps=steps, tokens=tokens),
        arms=choose_arms(all_arms(chosen, folder), arms),
        seeds=tuple(range(1, seeds + 1)),
    )
    return plan, folder


def _study(
    run: "Callable[[Plan, TokenizedDataset, Path, Progress, str], dict[str, Any]]",
    plan: "Plan",
    folder: "TokenizedDataset",
    output: _Output,
) -> None:
    page = output.page
    from lowlat.utils.progress import make_progress
    from lowlat_lab.study.page import check_page, write_page
    from lowlat_lab.study.plot import require_matplotlib
    from lowlat_lab.study.table import show

    progress = make_progress(quiet=output.quiet)
    if page is not None and page.suffix != ".md":
        raise UserError(f"--page {page}: give a file that ends in .md")
    if output.dry_run:
        from lowlat_lab.study.dry_run import describe

        return describe(plan, folder, progress, as_json=output.as_json)
    require_matplotlib()
    # Hours of training come before they are written.
    check_page(output.out / "report.md", "--out")
    if page is not None:
        check_page(page, "--page")
    report = run(plan, folder, output.out.resolve(), progress, _command(plan))
    written = write_page(report, output.out / "report.md")
    if page is not None:
        written += write_page(report, page)
    if output.as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    print(f"wrote {', '.join(map(str, written))}", file=sys.stderr)
    if report["failures"]:
        raise typer.Exit(1)
    return None


def _command(plan: "Plan") -> str:
    """How to run the same again; names of folders instead of places on this machine."""
    words = ["lowlat", "study", plan.kind, "--data", plan.data.name, "--out", "FOLDER"]
    words += ["--size", plan.size.name, "--steps", str(plan.steps)]
    words += ["--seeds", str(len(plan.seeds))]
    if plan.kind != "mtp":
        words += ["--arms", ",".join(arm.name for arm in plan.arms)]
    return shlex.join(words)
