"""The report of one training or several: their logs found, summed up and drawn.

Owns which files are read and written. `lowlat train report` prints what this returns, and a
trainer calls `write_report` when it is done.
"""

import json
from pathlib import Path

from lowlat.train.metrics.jsonl import LOG_NAME, RunHistory, read_log
from lowlat.train.metrics.lines import plain
from lowlat.train.metrics.plot import FORMATS, draw
from lowlat.train.metrics.summary import Summary, summarise
from lowlat.utils.errors import UserError

REPORT_STEM = "report"
"""Reports lie beside the log of their run under this name."""


def read_runs(runs: list[Path]) -> dict[str, RunHistory]:
    """The history of each run by a label that tells them apart.

    Args:
        runs: folders of runs, or their logs.

    Raises:
        UserError: a run named twice, or without a log that can be read.
    """
    names = [run.resolve().name if run.is_dir() else run.resolve().parent.name for run in runs]
    labels = [
        name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label}: named twice; name every run once")
    return {label: read_log(log_of(run)) for label, run in zip(labels, runs, strict=True)}


def log_of(run: Path) -> Path:
    """The log of a run that is named by its folder or by the log itself."""
    return run / LOG_NAME if run.is_dir() else run


def pictures(out: Path) -> list[Path]:
    """The files that `--out` means: itself, or a png and an svg where it has no ending.

    Raises UserError for the ending of something else.
    """
    if not out.suffix:
        return [out.with_suffix(".png"), out.with_suffix(".svg")]
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: must end in {', '.join(FORMATS)}, or have no ending")
    return [out]


def write_report(history: RunHistory) -> list[Path]:
    """Draw and sum up one run beside its log, as report.png, report.svg and report.json.

    Returns the files. Raises UserError without matplotlib, where no step is done yet, or where a
    file cannot be written.
    """
    folder = history.path.parent
    summary = summarise(history)
    files = pictures(folder / REPORT_STEM)
    draw({history.start.name: history}, files)
    return [*files, write_json(summary, folder / f"{REPORT_STEM}.json")]


def write_json(summary: Summary | dict[str, Summary], path: Path) -> Path:
    """`summary`, or several by label, as strict JSON in `path`, which is returned. Raises UserError
    if it cannot be.
    """
    text = json.dumps(plain(summary), allow_nan=False, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror})") from error
    return path
