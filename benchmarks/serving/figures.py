"""Metrics of a benchmark: rates, percentiles, ratio to the best peer; as JSON, table and plot.

Rates are the median over the rounds. Percentiles are over the requests of all rounds, because the
99th percentile of a single round would be its worst request.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.client import Answer

OWN = "lowlat"
LOWER_IS_BETTER = ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99", "tpot_p50")
HIGHER_IS_BETTER = ("output_per_second", "total_per_second")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One server at one concurrency in one round."""

    server: str
    concurrency: int
    round: int
    seconds: float
    answers: list[Answer]

    @property
    def good(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.error is None]

    def rate(self, *, with_prompts: bool) -> float:
        """Output tokens per second; `with_prompts` also counts prompt tokens."""
        tokens = sum(a.output_tokens + (a.prompt_tokens if with_prompts else 0) for a in self.good)
        return tokens / self.seconds

    def record(self) -> dict[str, Any]:
        """The turn in the JSON object: every request, with times from the start of the turn."""
        first = min((answer.started for answer in self.answers), default=0.0)
        return {
            "server": self.server,
            "concurrency": self.concurrency,
            "round": self.round,
            "seconds": round(self.seconds, 4),
            "requests": [
                {
                    "started": round(answer.started - first, 4),
                    "first": round(answer.pieces[0] - first, 4) if answer.pieces else None,
                    "ended": round(answer.ended - first, 4),
                    "pieces": len(answer.pieces),
                    "longest_gap": round(max(answer.gaps, default=0.0), 4),
                    "prompt_tokens": answer.prompt_tokens,
                    "output_tokens": answer.output_tokens,
                    "error": answer.error,
                }
                for answer in self.answers
            ],
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def row_of(turns: Sequence[Turn]) -> dict[str, Any]:
    """Metrics over all rounds of one server at one concurrency. Times in seconds."""
    good = [answer for turn in turns for answer in turn.good]
    errors = [answer.error for turn in turns for answer in turn.answers if answer.error is not None]
    row: dict[str, Any] = {
        "server": turns[0].server,
        "concurrency": turns[0].concurrency,
        "requests": len(good) + len(errors),
        "failed": len(errors),
        "errors": sorted(set(errors))[:5],
    }
    if not good:
        return row
    gaps = [gap for answer in good for gap in answer.gaps]
    tpots = [answer.tpot for answer in good if answer.tpot is not None]
    output = [turn.rate(with_prompts=False) for turn in turns]
    row |= {
        "output_per_second": statistics.median(output),
        "output_rounds": output,
        "total_per_second": statistics.median(turn.rate(with_prompts=True) for turn in turns),
        "ttft_p50": percentile([a.ttft for a in good], 0.5),
        "ttft_p99": percentile([a.ttft for a in good], 0.99),
    }
    if gaps:
        row |= {"itl_p50": percentile(gaps, 0.5), "itl_p99": percentile(gaps, 0.99)}
    if tpots:
        row["tpot_p50"] = percentile(tpots, 0.5)
    return row


def rows_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A row per concurrency and server, lowlat first, with its ratios to the best peer."""
    kinds = dict.fromkeys((turn.concurrency, turn.server) for turn in turns)
    rows = [
        row_of([t for t in turns if (t.concurrency, t.server) == kind])
        for kind in sorted(kinds, key=lambda kind: (kind[0], kind[1] != OWN, kind[1]))
    ]
    for row in rows:
        if row["server"] == OWN:
            peers = [r for r in rows if r["concurrency"] == row["concurrency"] and r is not row]
            row["ratios"] = ratios(row, peers)
    return rows


def ratios(own: dict[str, Any], peers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Ratio to the best peer per metric; above 1 is better."""
    found = {}
    for name in HIGHER_IS_BETTER + LOWER_IS_BETTER:
        values = [peer[name] for peer in peers if peer.get(name)]
        if not values or not own.get(name):
            continue
        if name in HIGHER_IS_BETTER:
            found[name] = own[name] / max(values)
        else:
            found[name] = min(values) / own[name]
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; times in milliseconds."""
    lines = [
        "| at once | server | output tok/s | total | TTFT p50 | p99 | ITL p50 | p99 | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [_milliseconds(row.get(n)) for n in ("ttft_p50", "ttft_p99", "itl_p50", "itl_p99")]
        rates = [_rate(row.get(n)) for n in HIGHER_IS_BETTER]
        cells = [row["concurrency"], row["server"], *rates, *times, row["failed"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        if row.get("ratios"):
            lines.append(_ratio_line(row["ratios"]))
    return "\n".join(lines)


def _ratio_line(found: dict[str, float]) -> str:
    names = (*HIGHER_IS_BETTER, "ttft_p50", "ttft_p99", "itl_p50", "itl_p99")
    cells = [f"{found[name]:.2f} x" if name in found else "-" for name in names]
    return "| | *over the best peer* | " + " | ".join(cells) + " | |"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:,.0f}"


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Throughput, TTFT and ITL over concurrency, one panel each; log scales."""
    from matplotlib.figure import Figure

    panels = (
        ("output_per_second", None, 1.0, "output tokens/s"),
        ("ttft_p50", "ttft_p99", 1000.0, "time to first token, ms (dashed: p99)"),
        ("itl_p50", "itl_p99", 1000.0, "between tokens, ms (dashed: p99)"),
    )
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    for place, (name, dashed, scale, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for number, server in enumerate(dict.fromkeys(row["server"] for row in rows)):
            done = [row for row in rows if row["server"] == server and row.get(name)]
            counts = [row["concurrency"] for row in done]
            axes.plot(counts, [r[name] * scale for r in done], f"C{number}o-", label=server)
            if dashed is not None:
                axes.plot(counts, [r[dashed] * scale for r in done], f"C{number}--")
        counts = sorted({row["concurrency"] for row in rows})
        axes.set(xscale="log", yscale="log", xlabel="requests at once", ylabel=label)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
