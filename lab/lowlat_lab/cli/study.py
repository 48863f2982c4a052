"""`lowlat-lab study`: ablation studies of small models, with confidence intervals over seeds."""

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
from lowlat_lab.cli.processors import use_processors
from lowlat_lab.cli.rewards import rewards

if TYPE_CHECKING:
    from lowlat.data.dataset import TokenizedDataset
    from lowlat.utils.progress import Progress
    from lowlat_lab.study.plan import StudyPlan, Variant
    from lowlat_lab.study.sizes import StudySize

Data = Annotated[
    Path,
    typer.Option(
        "--data",
        metavar="TOKENS",
        help="Tokenized dataset made by lowlat data build, with documents held out.",
        show_default=False,
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FOLDER",
        help="Folder of the runs, FOLDER/VARIANT/seed-N; the same command resumes.",
        show_default=False,
    ),
]
Variants = Annotated[
    str | None,
    typer.Option(
        metavar="VARIANT,...", help="Variants to run, including the baseline.", show_default=False
    ),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Number, length and size of the trainings."""

    seeds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Runs per variant: seeds 1 to N.")
    ] = 3
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Optimizer steps of a run; default: by size.",
            show_default=False,
        ),
    ] = None
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Length of a run in tokens, instead of --steps.",
            show_default=False,
        ),
    ] = None
    size: Annotated[
        str,
        typer.Option(
            "--size", help="Of the models: tiny, small, medium, or small-1k, medium-1k (long rows)."
        ),
    ] = "small"
    at_most: Annotated[
        int | None,
        typer.Option(
            "--at-most",
            metavar="N",
            min=0,
            help="Train N missing runs at most; 1: the next, 0: only report the finished ones.",
            show_default=False,
        ),
    ] = None
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Threads; default: all.", show_default=False),
    ] = None
    idle: Annotated[
        bool,
        typer.Option(
            "--idle",
            help="Use idle processor time only (start it with setsid); measure no decode times.",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputOptions:
    """What a study prints and writes next to its runs."""

    page: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write the page FILE.md with its plot and report.",
            show_default=False,
        ),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show variants, parameters and estimated time.")
    ] = False
    as_json: options.Json = False
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False


app = typer.Typer(
    help="Ablation studies: train small models that differ in one factor, with several seeds.",
    no_args_is_help=True,
)


@app.command("attention")
@options.with_option_groups
def attention(
    *, data: Data, out: Out, runs: RunOptions, variants: Variants = None, output: OutputOptions
) -> None:
    """MHA, GQA, MLA, MLRA, gated MLA, DSA and MLA with fewer RoPE layers at equal parameters.

    Held-out loss with confidence, recall and copying (with data of `study tasks`), cache per token,
    decode time at long contexts. MQA, GLA, GTA and TPA run if --variants names them.
    """
    wait_passively()
    from lowlat_lab.study import attention as own

    def all_variants(chosen: "StudySize", folder: "TokenizedDataset") -> "Sequence[Variant]":
        found = own.attention_variants(chosen, folder.vocab_size)
        return found if variants else own.usual(found)

    plan, folder = _plan("attention", data, runs, variants, all_variants)
    _study(own.study, plan, folder, out, output)


app.command("rewards")(rewards)


@app.command("tasks")
def tasks(
    data: Annotated[Path, typer.Argument(metavar="TOKENS", help="Tokenized dataset of text.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    *,
    share: Annotated[float, typer.Option(help="Of the training tokens.")] = 0.1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Add documents of recall and copying tasks to a dataset, for the attention study."""
    from lowlat.data.dataset import TokenizedDataset
    from lowlat.utils.progress import make_progress
    from lowlat_lab.study.tasks import add_tasks

    opened = TokenizedDataset.open(data)
    written = add_tasks(opened, destination, share=share, progress=make_progress(quiet=quiet))
    print(f"{destination}: {written.num_tokens('train'):,} training tokens")


@app.command("balance")
@options.with_option_groups
def balance(
    *, data: Data, out: Out, runs: RunOptions, variants: Variants = None, output: OutputOptions
) -> None:
    """Expert load balancing by a routing bias, an auxiliary loss, or none: loss and MaxVio."""
    wait_passively()
    from lowlat_lab.study import balance as own

    plan, folder = _plan(
        "balance", data, runs, variants, lambda chosen, _: own.balance_variants(chosen)
    )
    _study(own.study, plan, folder, out, output)


@app.command("mtp")
@options.with_option_groups
def mtp(*, data: Data, out: Out, runs: RunOptions, output: OutputOptions) -> None:
    """A model trained with and without a multi-token prediction module: loss, acceptance rate."""
    wait_passively()
    from lowlat_lab.study import mtp as own

    plan, folder = _plan("mtp", data, runs, None, lambda chosen, _: own.mtp_variants(chosen))
    _study(own.study, plan, folder, out, output)


@app.command("precision")
@options.with_option_groups
def precision(
    *, data: Data, out: Out, runs: RunOptions, variants: Variants = None, output: OutputOptions
) -> None:
    """One model trained in bf16, in DeepSeek-V3's FP8 and in fp32: loss relative to bf16's."""
    wait_passively()
    from lowlat_lab.study import precision as own

    plan, folder = _plan(
        "precision", data, runs, variants, lambda chosen, _: own.precision_variants(chosen)
    )
    _study(own.study, plan, folder, out, output)


def _plan(
    kind: str,
    data: Path,
    runs: RunOptions,
    variants: str | None,
    all_variants: "Callable[[StudySize, TokenizedDataset], Sequence[Variant]]",
) -> "tuple[StudyPlan, TokenizedDataset]":
    from lowlat_lab.study.plan import StudyPlan, choose_variants, num_steps, open_data
    from lowlat_lab.study.sizes import find_size

    chosen = find_size(runs.size)
    folder = open_data(data, chosen)
    plan = StudyPlan(
        kind=kind,
        data=folder.path,
        size=chosen,
        steps=num_steps(chosen, steps=runs.steps, tokens=runs.tokens),
        variants=choose_variants(all_variants(chosen, folder), variants),
        seeds=tuple(range(1, runs.seeds + 1)),
        limit=runs.at_most,
        measures_speed=runs.at_most is None and not runs.idle,
    )
    use_processors(runs.threads, idle=runs.idle)
    return plan, folder


def _study(
    run: "Callable[[StudyPlan, TokenizedDataset, Path, Progress, str], dict[str, Any]]",
    plan: "StudyPlan",
    folder: "TokenizedDataset",
    out: Path,
    output: OutputOptions,
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
    # checked before hours of training
    check_page(out / "report.md", "--out")
    if page is not None:
        check_page(page, "--page")
    report = run(plan, folder, out.resolve(), progress, _command(plan))
    written = write_page(report, out / "report.md")
    if page is not None:
        written += write_page(report, page)
    done = sum(len(variant["runs"]) for variant in report["variants"])
    print(f"{done} of {len(plan.runs)} runs are finished", file=sys.stderr)
    if output.as_json:
        print(json.dumps(report, indent=2))
    else:
        show(report)
    print(f"wrote {', '.join(map(str, written))}", file=sys.stderr)
    if report["failures"]:
        raise typer.Exit(1)
    return None


def _command(plan: "StudyPlan") -> str:
    """The command that repeats the study, without local paths."""
    words = ["lowlat-lab", "study", plan.kind, "--data", plan.data.name, "--out", "FOLDER"]
    words += ["--size", plan.size.name, "--steps", str(plan.steps)]
    words += ["--seeds", str(len(plan.seeds))]
    if plan.kind != "mtp":
        words += ["--variants", ",".join(variant.name for variant in plan.variants)]
    return shlex.join(words)
