"""Files of training reports: find logs, write plots and report.json."""

import json
from pathlib import Path

from lowlat.train.metrics.jsonl import LOG_NAME, RunHistory, read_log
from lowlat.train.metrics.lines import plain
from lowlat.train.metrics.plot import FORMATS, draw
from lowlat.train.metrics.summary import Summary, summarise
from lowlat.utils.errors import UserError

REPORT_STEM = "report"
"""Name of report files, next to the log of their run."""


def read_runs(runs: list[Path]) -> dict[str, RunHistory]:
    """Read the history of each run, by a unique label.

    Args:
        runs: run folders, or their logs.

    Raises:
        UserError: a run named twice, or without a readable log.
    """
    names = [run.resolve().name if run.is_dir() else run.resolve().parent.name for run in runs]
    labels = [
        name if names.count(name) == 1 else str(run) for name, run in zip(names, runs, strict=True)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{label}: named twice; name every run once")
    logs = [run / LOG_NAME if run.is_dir() else run for run in runs]
    return {label: read_log(log) for label, log in zip(labels, logs, strict=True)}


def pictures(out: Path) -> list[Path]:
    """Plot files of `--out`: the file itself, or a .png and an .svg without a suffix.

    Raises UserError for another suffix.
    """
    if not out.suffix:
        return [out.with_suffix(".png"), out.with_suffix(".svg")]
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"--out {out}: must end in {', '.join(FORMATS)}, or have no suffix")
    return [out]


def write_report(history: RunHistory) -> list[Path]:
    """Write report.png, report.svg and report.json of one run next to its log.

    Returns the files. Raises UserError without matplotlib, without a completed step, or if a file
    cannot be written.
    """
    folder = history.path.parent
    summary = summarise(history)
    files = pictures(folder / REPORT_STEM)
    draw({history.start.name: history}, files)
    return [*files, write_json(summary, folder / f"{REPORT_STEM}.json")]


def write_json(summary: Summary | dict[str, Summary], path: Path) -> Path:
    """Write `summary`, or several by label, as strict JSON to `path`; returns `path`. Raises
    UserError if writing fails.
    """
    text = json.dumps(plain(summary), allow_nan=False, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror})") from error
    return path
