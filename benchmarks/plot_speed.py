"""Draw docs/results/cpu.svg: decode throughput over context, lowlat and llama.cpp.

python benchmarks/plot_speed.py docs/results/cpu.svg
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from lowlat.utils.plots import BLUE, ORANGE, STYLE

RESULTS = Path(__file__).parent / "results"
RUNS = {"Zen 5": "2026-11-28-zen5-mini-bf16", "Zen 4": "2026-11-27-zen4-spans-mini-bf16"}
COLORS = {"lowlat": BLUE, "llama.cpp": ORANGE}


def main() -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for style, (machine, run) in zip(("o-", "s--"), RUNS.items(), strict=True):
            results = json.loads((RESULTS / f"{run}.json").read_text(encoding="utf-8"))
            for program, color in COLORS.items():
                draw(axes, results, program, machine, style, color)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="tokens in the KV cache",
            title="Decode, tok/s: the lead over llama.cpp grows with the context",
        )
        axes.set_xlim(100, 250_000)
        axes.set_xticks([128, 2048, 8192, 32768], ["128", "2,048", "8,192", "32,768"])
        axes.set_yticks([3, 10, 30, 100], ["3", "10", "30", "100"])
        axes.minorticks_off()
        figure.savefig(sys.argv[1], metadata={"Date": None})


def draw(
    axes: Any, results: dict[str, Any], program: str, machine: str, style: str, color: str
) -> None:
    rows = [r for r in results["rows"] if r["program"] == program and r["kind"] == "decode"]
    tokens = [row["tokens"] for row in rows]
    rates = [row["tokens_per_second"] for row in rows]
    axes.plot(tokens, rates, style, color=color, markersize=4)
    label = f"{program}, {machine}"
    axes.annotate(
        label, (tokens[-1], rates[-1]), (6, 0), textcoords="offset points", color=color, va="center"
    )


if __name__ == "__main__":
    main()
