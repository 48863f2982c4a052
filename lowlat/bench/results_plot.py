"""Plot of benchmark results: tokens per second over context, with the roofline."""

from pathlib import Path
from typing import Any

from lowlat.utils.errors import UserError

TITLES = {"prefill": "Prefill", "decode": "Decode, one sequence"}
AXES = {"prefill": "prompt tokens", "decode": "tokens in the KV cache"}


def require_matplotlib() -> None:
    """Raises UserError without matplotlib; called before minutes of measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--out draws a plot and needs matplotlib; install lowlat[bench], or use --json"
        ) from error


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the plot; the suffix of `path` selects the format (svg, png, pdf)."""
    from matplotlib.figure import Figure

    kinds = [kind for kind in TITLES if any(row["kind"] == kind for row in results["rows"])]
    figure = Figure(figsize=(6.0 * len(kinds), 4.5), layout="constrained")
    for place, kind in enumerate(kinds, start=1):
        _panel(figure.add_subplot(1, len(kinds), place), results, kind)
    model, plan = Path(results["model"]["path"]).name, results["plan"]
    figure.suptitle(
        f"{model}, {plan['dtype']} weights, {plan['cache']} cache, {plan['threads']} threads, "
        f"{results['machine']['cpu']}",
        fontsize=10,
    )
    figure.savefig(path)


def draw_scaling(scaling: dict[str, Any], path: Path) -> None:
    """Write the scaling curve: speedup over the fewest threads by number of threads."""
    from matplotlib.figure import Figure

    threads = scaling["threads"]
    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    ideal = [count / threads[0] for count in threads]
    axes.plot(threads, ideal, "--", color="black", label="proportional")
    for case in scaling["cases"]:
        rates = case["tokens_per_second"]
        if all(rates):
            speedups = [rate / rates[0] for rate in rates]
            axes.plot(threads, speedups, "o-", label=f"{case['kind']} {case['tokens']:,}")
    axes.set(xlabel="threads", ylabel="speedup", title=scaling["runs"][0]["machine"]["cpu"])
    axes.set_xticks(threads)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _panel(axes: Any, results: dict[str, Any], kind: str) -> None:
    rows = [row for row in results["rows"] if row["kind"] == kind]
    own = [row for row in rows if row["program"] == "lowlat"]
    axes.plot(
        [row["tokens"] for row in own],
        [row["roofline_tokens_per_second"] for row in own],
        "--",
        color="black",
        label="roofline",
    )
    for name, program in results["programs"].items():
        done = [r for r in rows if r["program"] == name and r["tokens_per_second"] is not None]
        if done:
            axes.plot(
                [row["tokens"] for row in done],
                [row["tokens_per_second"] for row in done],
                "o-",
                label=f"{name} ({program['precision']})",
            )
    lengths = sorted({row["tokens"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel=AXES[kind], ylabel="tokens/s", title=TITLES[kind])
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
