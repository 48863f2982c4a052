"""Report plot of training runs: the page of panels for one run, or for several runs compared."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowlat.train.metrics.formatting import count
from lowlat.train.metrics.jsonl import RunHistory
from lowlat.train.metrics.plot_panels import (
    COLOURS,
    DrawnRun,
    balance,
    bias,
    curve,
    divergence,
    draw_maps,
    is_taught,
    log_scale,
    losses,
    of_rollouts,
    pass_at_k,
    rewards,
)
from lowlat.train.metrics.record import StepRecord
from lowlat.train.metrics.series import LoadMap, finite, load_maps
from lowlat.utils.errors import UserError
from lowlat.utils.plots import STYLE

FORMATS = (".png", ".svg", ".pdf")
"""Suffixes of plot files."""
_COLUMNS = 3
_WIDTH, _HEIGHT = 4.4, 2.6
"""Size of a panel in inches."""
_MOST_MAPS = 18
ROLLOUT_ROWS = 3
"""Rows of panels of GRPO."""
_DOTS_PER_INCH = 130
_STYLE: dict[Any, Any] = STYLE | {
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def available() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw(histories: dict[str, RunHistory], paths: list[Path]) -> None:
    """Draw the runs, by label, and write the plot to each of `paths`; suffixes choose the formats.

    A single run is drawn over steps, with maps of expert loads; several runs are drawn over tokens,
    without them. Every run must have a step. Raises UserError without matplotlib, or if a file
    cannot be written.
    """
    if not available():
        raise UserError("plots need matplotlib: pip install lowlat[train]")
    import matplotlib
    from matplotlib.figure import Figure

    runs = _runs(histories)
    maps = _chosen(load_maps(runs[0].history, runs[0].x)) if runs[0].alone else []
    with_experts = any(step.experts for run in runs for step in run.history.steps)
    with_teacher = any(is_taught(run) for run in runs)
    with_rollouts = any(step.rollouts for run in runs for step in run.history.steps)
    rows = 3 + with_experts + ROLLOUT_ROWS * with_rollouts + with_teacher
    map_rows = -(-len(maps) // _COLUMNS)
    with matplotlib.rc_context(_STYLE):
        size = (_WIDTH * _COLUMNS, _HEIGHT * (rows + map_rows))
        figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, layout="constrained")
        grid = figure.add_gridspec(rows + map_rows, _COLUMNS)
        _panels(figure, grid, runs)
        if with_experts:
            _expert_panels(figure, grid, runs)
        if with_rollouts:
            _rollout_panels(figure, grid, 3 + with_experts, runs)
        if with_teacher:
            _teacher_panels(figure, grid[rows - 1, :], runs)
        if maps:
            places = [grid[rows + i // _COLUMNS, i % _COLUMNS] for i in range(len(maps))]
            draw_maps(figure, [figure.add_subplot(place) for place in places], maps)
        figure.suptitle(_title(runs), fontsize=12, x=0.01, ha="left")
        for path in paths:
            _save(figure, path)


def _chosen(maps: list[LoadMap]) -> list[LoadMap]:
    """All maps, or as many as fit the page, spread evenly over the layers."""
    if len(maps) <= _MOST_MAPS:
        return maps
    return [maps[round(i * (len(maps) - 1) / (_MOST_MAPS - 1))] for i in range(_MOST_MAPS)]


def _runs(histories: dict[str, RunHistory]) -> list[DrawnRun]:
    alone = len(histories) == 1
    return [
        DrawnRun(
            label=label,
            colour=COLOURS[place % len(COLOURS)],
            history=history,
            x=finite([float(step.step if alone else step.tokens) for step in history.steps]),
            alone=alone,
        )
        for place, (label, history) in enumerate(histories.items())
    ]


def _title(runs: list[DrawnRun]) -> str:
    if not runs[0].alone:
        return f"{len(runs)} runs compared"
    last, start = runs[0].history.steps[-1], runs[0].history.start
    return f"{start.name}: step {last.step:,} of {start.total_steps:,}, {count(last.tokens)} tokens"


def _panels(figure: Any, grid: Any, runs: list[DrawnRun]) -> None:
    """Rows 0 to 2: losses, or rewards of runs without; learning rate and gradient norm on the
    right, throughput below.
    """
    largest = losses if _have_losses(runs) else rewards
    largest(figure.add_subplot(grid[0:2, 0:2]), runs)
    curve(figure.add_subplot(grid[0, 2]), runs, "learning rate", lambda s: s.learning_rate)
    norms = figure.add_subplot(grid[1, 2])
    curve(norms, runs, "gradient norm before clipping", lambda s: s.grad_norm, noisy=True)
    log_scale(norms)
    speed = figure.add_subplot(grid[2, 0])
    curve(speed, runs, "tokens per second", lambda s: s.tokens_per_second, noisy=True)
    speed.set_ylim(bottom=0)
    mfu = figure.add_subplot(grid[2, 1])
    percent = "MFU, % of measured matrix products"
    curve(mfu, runs, percent, lambda s: None if s.mfu is None else 100 * s.mfu, noisy=True)
    mfu.set_ylim(bottom=0)
    batch = figure.add_subplot(grid[2, 2])
    curve(batch, runs, "batch, tokens per step", lambda s: float(s.batch_tokens))
    batch.set_ylim(bottom=0)


def _have_losses(runs: list[DrawnRun]) -> bool:
    """Whether the largest panel has losses: of any step, or there are no rewards."""
    steps = [step for run in runs for step in run.history.steps]
    return any(step.loss is not None for step in steps) or not any(s.rollouts for s in steps)


def _expert_panels(figure: Any, grid: Any, runs: list[DrawnRun]) -> None:
    """Row 3: expert load balance and routing biases."""
    over = "" if runs[0].alone else ", mean of layers"
    title = f"MaxVio = largest load / mean - 1{over}"
    balance(figure.add_subplot(grid[3, 0]), runs, title, lambda e: e.max_violation)
    title = f"entropy of load / ln(experts){over}"
    balance(figure.add_subplot(grid[3, 1]), runs, title, lambda e: e.entropy)
    bias(figure.add_subplot(grid[3, 2]), runs)


def _rollout_panels(figure: Any, grid: Any, first: int, runs: list[DrawnRun]) -> None:
    """Rows from `first`: rollouts and updates of GRPO, and pass@k."""
    is_drawn = not _have_losses(runs)
    reward = ("deviation of rewards", "reward_std") if is_drawn else ("mean reward", "reward")
    curves = {
        reward[0]: of_rollouts(reward[1]),
        "tokens per completion": of_rollouts("length"),
        "truncated completions, %": of_rollouts("truncated", 100.0),
        "groups without signal, %": of_rollouts("no_signal", 100.0),
        "entropy, nats per token": of_rollouts("entropy"),
        "KL from the reference, nats per token": of_rollouts("kl"),
        "clipped tokens, %": of_rollouts("clipped", 100.0),
        "sampled tokens per second": _sampling_rate,
    }
    pass_at_k(figure.add_subplot(grid[first, 0]), runs)
    for place, (title, value) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(grid[first + place // _COLUMNS, place % _COLUMNS])
        curve(axes, runs, title, value, noisy=True)


def _sampling_rate(step: StepRecord) -> float | None:
    """None in later updates over the same completions, which sample nothing."""
    rate = 0.0 if step.rollouts is None else step.rollouts.rollout_tokens_per_second
    return rate or None


def _teacher_panels(figure: Any, row: Any, runs: list[DrawnRun]) -> None:
    """Last row before the maps: divergence from the teacher."""
    halves = row.subgridspec(1, 2)
    divergence(figure.add_subplot(halves[0]), runs)
    layers = figure.add_subplot(halves[1])
    curve(layers, runs, "relative squared error of layers", lambda s: s.layer_error, noisy=True)
    log_scale(layers)


def _save(figure: Any, path: Path) -> None:
    # Without dates the same run gives the same files.
    undated = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=undated[path.suffix.lower()])
    except OSError as error:
        raise UserError(
            f"{path}: the plot cannot be written ({error.strerror}); name another file with --out"
        ) from error
