"""Result page of the GRPO study, written from its report: what was run, what came out, what was
not run.
"""

from pathlib import Path
from typing import Any

from lowlat_lab.rewards.plot import draw
from lowlat_lab.rewards.report import LAST_PART, Report
from lowlat_lab.study.page import BEGIN, END, markdown, update_page
from lowlat_lab.study.statistics import confidence
from lowlat_lab.study.table import failure_text

TITLE = "GRPO: rewards over steps, and zero mismatch"
COMMAND = "lowlat-lab study rewards --out FOLDER --gsm8k FOLDER --threads 1 --page rewards.md"

Entry = dict[str, Any]


def write_page(report: Report, page: Path) -> list[Path]:
    """Write `page` (.md), its plot (.svg) and its report (.json), as `update_page`."""
    return update_page(report, page, TITLE, draw, generated_text)


def generated_text(report: Report, picture: str, figures: str) -> str:
    """The generated part of the page, with its marks; `picture` and `figures` are file names."""
    machine = report["machine"]
    entries = [each for each in report["experiments"] if _num_runs(each)]
    place = f"{report['date']}, {machine['cpu']}, one thread, PyTorch {machine['torch']}"
    parts = [
        BEGIN,
        f"![{TITLE}]({picture})",
        markdown(*_results(entries)),
        f"± is {confidence()} confidence over seeds (Student). Gain: pass@1 at the end minus that "
        "before the first step of the same run. Reward: mean of the last "
        f"1/{LAST_PART} of the steps. CPU hours: of all runs, evaluations included.",
        *_ablation(entries),
        f"    {COMMAND}",
        "\n".join([f"- {setting}" for setting in (place, *map(_setting, entries))]),
        _missing(report),
        "\n".join(f"- {failure_text(item)}" for item in report["failures"]),
        f"All runs: [{figures}]({figures}).",
        END,
    ]
    return "\n\n".join(part for part in parts if part)


def _results(entries: list[Entry]) -> tuple[list[str], list[list[str]]]:
    headings = ["model, task", "forward pass of the trainer", "seeds"]
    headings += ["pass@1 before", "at the end", "gain", "reward", "CPU hours"]
    rows = [
        [
            f"{entry['model']}, {entry['task']}",
            each["label"],
            str(len(each["runs"])),
            percent(each["before"]),
            percent(each["after"]),
            percent(each["gain"], signed=True),
            f"{each['reward']['mean']:.3f}{_half(each['reward'], 1, 3)}",
            f"{each['cpu_hours']:.3f}",
        ]
        for entry in entries
        for each in entry["variants"]
        if each["runs"]
    ]
    return headings, rows


def _ablation(entries: list[Entry]) -> list[str]:
    """Mismatch of each variant, and its paired differences from the first."""
    rows = []
    for entry in entries:
        compared = {item["left"]: item for item in entry["comparisons"]}
        if not compared:
            continue
        for each in entry["variants"]:
            if each["runs"]:
                rows.append([f"{entry['task']}: {each['label']}", *_mismatch(each, compared)])
    if not rows:
        return []
    headings = ["", "largest difference", "mean difference", "KL, nats per token"]
    headings += ["rerouted", "pass@1, minus engine's", "reward, minus engine's"]
    text = (
        "Differences of the log-probability of sampled tokens between engine and trainer; "
        "KL divergence of the trainer's distribution from the engine's; share of router decisions "
        "(tokens x MoE layers) with other experts. Differences of results are paired by seed."
    )
    return [markdown(headings, rows), text]


def _mismatch(each: Entry, compared: dict[str, Entry]) -> list[str]:
    item = compared.get(each["name"])
    if "difference" not in each:
        zero = "0" if each["mismatch"] == 0 else ""
        return [f"{each['mismatch']:.3g}", zero, zero, zero, "", ""]
    rerouted = each.get("rerouted")
    return [
        f"{each['mismatch']:.3g}",
        f"{each['difference']:.2g}",
        f"{each['divergence']:.2g}",
        "" if rerouted is None else percent({"mean": rerouted, "half": None}),
        "" if item is None else percent(item["after"], signed=True),
        "" if item is None else f"{item['reward']['mean']:+.3f}{_half(item['reward'], 1, 3)}",
    ]


def percent(value: Entry, *, signed: bool = False) -> str:
    """'12.3 % ± 1.2', of a share with its interval."""
    sign = "+" if signed else ""
    return f"{100 * value['mean']:{sign}.1f} %{_half(value, 100, 1)}"


def _half(value: Entry, factor: int, digits: int) -> str:
    return "" if value["half"] is None else f" ± {factor * value['half']:.{digits}f}"


def _setting(entry: Entry) -> str:
    """Settings of an experiment in one sentence."""
    tuned = ""
    if entry["fine_tuning_steps"]:
        tuned = (
            f", after {entry['fine_tuning_steps']} steps of supervised fine-tuning on solved "
            f"examples ({entry['fine_tuning_cpu_hours']:.3f} CPU hours)"
        )
    return (
        f"{entry['model']}, {entry['task']} ({entry['label']}): {entry['steps']} steps of "
        f"{entry['batch_size']} completions in groups of {entry['num_generations']}, learning rate "
        f"{entry['learning_rate']:g}{tuned}; pass@1 of {entry['held_out_samples']} completions for "
        f"each of {entry['held_out']} held-out prompts"
    )


def _missing(report: Report) -> str:
    """What the same command would run next."""
    wanted = []
    for entry in report["experiments"]:
        done, total = _num_runs(entry), entry["seeds"] * len(entry["variants"])
        if done < total:
            wanted.append(f"{entry['model']}, {entry['task']} ({done} of {total} runs)")
    if not wanted:
        return ""
    return f"Not run, or not complete; the same command resumes: {'; '.join(wanted)}."


def _num_runs(entry: Entry) -> int:
    return sum(len(each["runs"]) for each in entry["variants"])
