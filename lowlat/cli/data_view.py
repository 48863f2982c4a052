"""Contents of a tokenized dataset as a table and as JSON."""

import json
from pathlib import Path

from rich.console import Console

from lowlat.cli.tables import number_table, print_rows
from lowlat.data.build import BuildReport
from lowlat.data.manifest import SPLITS, DatasetManifest, SplitManifest, to_json


def print_build(report: BuildReport, console: Console | None = None) -> None:
    """Print the contents, path, time and warnings of a build."""
    console = Console() if console is None else console
    manifest = report.manifest
    print_manifest(report.path, manifest, console)
    if report.asked_vocab is not None and manifest.vocab_size < report.asked_vocab:
        console.print(
            f"The vocabulary is smaller than the {report.asked_vocab:,} requested: no further pair"
            " of tokens occurs twice in the text.",
            style="yellow",
        )
    if not manifest.splits["held_out"].documents:
        console.print(
            "No document is held out: raise --held-out, give --held-out-source, or split files"
            " into documents with --separator.",
            style="yellow",
        )
    rate = sum(split.text_bytes for split in manifest.splits.values()) / 1e6 / report.seconds
    seconds = f"{report.seconds:.1f} s, {rate:.1f} MB/s"
    console.print(f"written  {report.path} in {seconds}", highlight=False, markup=False)


def print_manifest(path: Path, manifest: DatasetManifest, console: Console | None = None) -> None:
    """Print the contents of the tokenized dataset `path`."""
    console = Console() if console is None else console
    names = ("documents", "tokens", "text bytes", "bytes per token", "targets")
    table = number_table("", *names, notes=False)
    for split in SPLITS:
        part = manifest.splits[split]
        table.add_row(
            split.replace("_", " "),
            *(f"{number:,}" for number in (part.documents, part.tokens, part.text_bytes)),
            f"{bytes_per_token(part):.3f}",
            f"{part.predicted / max(part.tokens, 1):.1%}",
        )
    console.print(table)
    dropped = ", ".join(f"{count:,} {why}" for why, count in manifest.dropped.items())
    rows = {
        "vocabulary": f"{manifest.vocab_size:,} tokens, {manifest.dtype.name} ids",
        "dropped": dropped or "nothing",
    }
    print_rows(rows, console)


def print_json(path: Path, manifest: DatasetManifest, **more: float | str) -> None:
    """Print one JSON object: tokens.json with path, `more` and bytes per token."""
    raw = {"path": str(path), **more, **to_json(manifest)}
    for split in SPLITS:
        raw[split]["bytes_per_token"] = bytes_per_token(manifest.splits[split])
    print(json.dumps(raw, indent=2))


def bytes_per_token(split: SplitManifest) -> float:
    """Mean UTF-8 bytes of text per token; 0 for an empty split."""
    return split.text_bytes / split.tokens if split.tokens else 0.0
