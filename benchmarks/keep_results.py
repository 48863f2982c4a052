"""Summarise a run's results.json for benchmarks/results: medians instead of samples.

    python benchmarks/keep_results.py FOLDER benchmarks/results/NAME.json

Lists of numbers become median, min, max and count. Samples of single requests and rounds, generated
tokens, logs of programs and plots are dropped.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

DROPPED = ("samples", "turns", "system_info", "token_ids")
"""Per-sample fields, and descriptions of a program's build."""
LISTED = ("context", "concurrency", "cases", "flags", "default_kinds", "peers")
"""Lists that are settings, not measurements."""


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    results = json.loads((source / "results.json").read_text(encoding="utf-8"))
    target.write_text(as_text(reduced(results)), encoding="utf-8")


def reduced(results: dict[str, Any]) -> dict[str, Any]:
    """The results without samples."""
    kept = {}
    for name, value in results.items():
        if name == "samples" and is_numbers(value):
            kept["samples"] = summary(value)
        elif name not in DROPPED and not (name == "tokens" and isinstance(value, list)):
            kept[name] = value if name in LISTED else reduced_value(value)
    if "samples" in results and "tokens_per_second" in results and results["samples"]:
        rates = [sample["tokens_per_second"] for sample in results["samples"]]
        kept |= {"min": digits(min(rates)), "max": digits(max(rates)), "count": len(rates)}
    return kept


def reduced_value(value: Any) -> Any:
    if isinstance(value, dict):
        return reduced(value)
    if is_numbers(value):
        return summary(value)
    if isinstance(value, list):
        if value and all(isinstance(item, dict) for item in value) and is_measured(value):
            names = value[0]
            return {name: summary([item[name] for item in value]) for name in names}
        return [reduced_value(item) for item in value]
    return digits(value)


def is_measured(items: list[dict[str, Any]]) -> bool:
    """Whether dicts are repetitions of one measurement: the same fields, all floats."""
    return len(items) > 1 and all(
        item.keys() == items[0].keys() and all(isinstance(v, float) for v in item.values())
        for item in items
    )


def is_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(type(v) is float for v in value)


def summary(values: list[float]) -> dict[str, Any]:
    return {
        "median": digits(statistics.median(values)),
        "min": digits(min(values)),
        "max": digits(max(values)),
        "count": len(values),
    }


def digits(value: Any) -> Any:
    """A float with six significant digits."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_text(results: dict[str, Any]) -> str:
    """JSON with one line per field, and one per item of a list of objects."""
    lines = []
    for name, value in results.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            items = ",\n  ".join(json.dumps(item) for item in value)
            lines.append(f'"{name}": [\n  {items}\n ]')
        else:
            lines.append(f'"{name}": {json.dumps(value)}')
    return "{\n " + ",\n ".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
