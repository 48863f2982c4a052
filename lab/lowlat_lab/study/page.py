"""A report as a page of docs/results: what was run, table, picture, and what follows from them.

Owns the order of the page and what all studies say; what one study says is `conclusions`'s. Every
figure is the report's, so a page can be written again from its JSON.
"""

import json
from pathlib import Path
from typing import Any

from lowlat.train.metrics.formatting import count
from lowlat.utils.errors import UserError
from lowlat_lab.study.conclusions import conclusions
from lowlat_lab.study.figures import table_of
from lowlat_lab.study.findings import confidence
from lowlat_lab.study.plot import draw
from lowlat_lab.study.report import Report
from lowlat_lab.study.table import failure_text

TITLES = {
    "attention": "Forms of attention at one number of parameters",
    "balance": "Balancing experts: bias, auxiliary loss, nothing",
    "mtp": "Multi-token prediction on and off",
    "precision": "Training in bf16, FP8 and fp32",
}
SUFFIXES = (".md", ".svg", ".json")
OPTIMIZERS = {"muon": "Muon", "adamw": "AdamW"}


def check_page(page: Path, option: str) -> None:
    """Make its folder and raise UserError, naming the `option` that gave it, where a page cannot be
    written.
    """
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for path in map(page.with_suffix, SUFFIXES):
            is_new = not path.exists()
            path.open("ab").close()
            if is_new:
                path.unlink()
    except OSError as error:
        raise UserError(
            f"{option}: {page} cannot be written ({error.strerror}); give another place"
        ) from error


def write_page(report: Report, page: Path) -> list[Path]:
    """Write `page` (.md), its picture (.svg) and its figures (.json) side by side; what was
    written. Raises UserError where that cannot be.
    """
    _, picture, figures = (page.with_suffix(suffix) for suffix in SUFFIXES)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        draw(report, picture)
        figures.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        page.write_text(page_text(report, picture.name, figures.name), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page}: cannot be written ({error.strerror})") from error
    return [page, picture, figures]


def page_text(report: Report, picture: str, figures: str) -> str:
    """The page; `picture` and `figures` are files beside it."""
    parts = [
        f"# {TITLES[report['study']]}",
        *_what_was_run(report),
        _markdown(*table_of(report)),
        _legend(report),
        f"![{TITLES[report['study']]}]({picture})",
        *conclusions(report),
        f"Every run is in [{figures}]({figures}).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_was_run(report: Report) -> list[str]:
    size, data, machine = report["size"], report["data"], report["machine"]
    seeds = ", ".join(map(str, report["seeds"]))
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    parts = [
        f"    {report['command']}",
        f"{report['date']}, {machine['cpu']}, {threads}, PyTorch {machine['torch']}. "
        f"Every arm is trained {len(report['seeds'])} times (seeds {seeds}) by "
        f"`lowlat train`'s trainer: {size['num_hidden_layers']} layers of {size['hidden_size']}, "
        f"{size['num_attention_heads']} heads of "
        f"{size['hidden_size'] // size['num_attention_heads']}, {report['steps']:,} steps of "
        f"{size['batch_size']} x {size['sequence_length']} tokens = {count(report['tokens'])} "
        f"tokens a run, {OPTIMIZERS[report['optimizer']]} with a peak rate of "
        f"{size['learning_rate']:g}, {_products(report)} over "
        "fp32 weights. A seed decides initial weights and the order of the data, and is the same "
        "for all arms; arms take turns.",
        f"Data: {count(data['train_tokens'])} training tokens, vocabulary {data['vocab_size']:,}, "
        f"fingerprint `{data['fingerprint'][:16]}`. Losses are nats per token of the saved models "
        f"over the same {report['held_out_windows']:,} windows of {size['sequence_length']} "
        f"held-out tokens{_text_error(report)}.",
    ]
    if report["failures"]:
        parts.append("\n".join(f"- {failure_text(item)}" for item in report["failures"]))
    return parts


def _products(report: Report) -> str:
    return "products as the arm says" if report["study"] == "precision" else "bf16 products"


def _text_error(report: Report) -> str:
    """How much a loss would scatter over other text of the kind, and differences would."""
    errors = [arm["standard_error"] for arm in report["arms"] if arm.get("standard_error")]
    pairs = [item["text_error"] for item in report["comparisons"] if item["text_error"]]
    if not errors or not pairs:
        return ""
    return (
        f": a loss has a standard error of {max(errors):.4f} over windows, but the text is the "
        f"same for all, and differences between arms have one of at most {max(pairs):.4f}"
    )


def _legend(report: Report) -> str:
    base = report["arms"][0]["label"]
    text = (
        f"± is {confidence()} confidence over seeds. *Minus {base}* is the mean of the differences "
        "seed by seed, with Student's interval of these differences."
    )
    if report["study"] != "attention":
        return text
    context = next((arm["decode"]["context"] for arm in report["arms"] if "decode" in arm), 0)
    return (
        f"{text} *Pooled* is the interval of a difference whose spread is estimated from all arms "
        "together, which is tighter and assumes that they scatter alike. Parameters: all of them, "
        "and how those beside the embedding differ from MHA's. Decoding: one sequence, "
        f"{context:,} tokens in the cache, bf16, rounds in turn; *: by PyTorch, without native "
        "kernels, so its speed is not to be compared. Training speed is the median over steps."
    )


def _markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    cells: list[list[Any]] = [[cell.replace("*", "\\*") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
