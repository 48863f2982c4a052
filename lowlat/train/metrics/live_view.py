"""Live progress view of a training in a terminal: a few lines at the bottom, redrawn regularly.

Notes and other output to stderr appear above them.
"""

import os
import sys
import time
from typing import final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lowlat.train.metrics.formatting import bars, clock, count, memory, rate, utilisation
from lowlat.train.metrics.metrics_log import MetricsLog, SilentMetricsLog
from lowlat.train.metrics.progress_view import (
    PlainView,
    ProgressTracker,
    evaluation_text,
    figure_text,
    heading,
)
from lowlat.train.metrics.record import EvalRecord, ExpertRecord, StartRecord, StepRecord

_REFRESHES_PER_SECOND = 2
_BESIDE_BAR = 64
"""Columns reserved next to the progress bar for name, steps and times."""
_BESIDE_LOAD = 44
"""Columns reserved next to the expert bars for the other values of a layer."""
_OTHER_LINES = 9
"""Lines of the terminal reserved for everything except expert layers."""


def make_view(*, quiet: bool = False) -> MetricsLog:
    """The live view if stderr is a terminal, else plain lines; silent if `quiet`."""
    if quiet or sys.stderr is None:
        return SilentMetricsLog()
    is_live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    return LiveView() if is_live else PlainView()


@final
class LiveView(MetricsLog):
    """Redraws itself on a thread, so that times advance during long steps."""

    def __init__(self) -> None:
        self._pace: ProgressTracker | None = None
        self._status = ""
        self._since = 0.0
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        # stdout has results and may be a pipe, so it must not go through this console.
        self._live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=_REFRESHES_PER_SECOND,
            redirect_stdout=False,
        )

    def start(self, record: StartRecord) -> None:
        self.note(heading(record))
        self._pace = ProgressTracker(record)
        self._since = time.monotonic()
        self._live.start()

    def step(self, record: StepRecord) -> None:
        assert self._pace is not None
        self._pace.step(record)
        self._since = time.monotonic()

    def evaluation(self, record: EvalRecord) -> None:
        if self._pace is not None:
            self._pace.evaluation = record

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def status(self, text: str) -> None:
        self._status = text

    def close(self) -> None:
        if self._live.is_started:
            self._status = ""
            self._live.stop()

    def _draw(self) -> RenderableType:
        pace = self._pace
        if pace is None:
            return Text("")
        waited = time.monotonic() - self._since
        width = self._console.width
        parts: list[RenderableType] = [_progress(pace, waited, self._status, width)]
        if pace.last is not None:
            parts += [_losses(pace, pace.last), _speed(pace, pace.last)]
            if pace.last.experts:
                room = max(1, self._console.height - _OTHER_LINES)
                parts.append(_experts(pace.last.experts, room, width))
        return Group(*parts)


def _progress(pace: ProgressTracker, waited: float, status: str, width: int) -> Table:
    """Name, progress bar, steps, times. `waited`: seconds since the last step or the start."""
    last, total = pace.last, pace.start.total_steps
    step = pace.start.step if last is None else last.step
    spent = waited + (0.0 if last is None else last.seconds)
    left = pace.seconds_left
    remaining = clock(None if left is None else max(0.0, left - waited))
    text = f"{step:,}/{total:,} steps  {clock(spent)} spent, {remaining} left"
    row = Table.grid(padding=(0, 1))
    row.add_row(
        Text(pace.start.name, "bold", no_wrap=True, overflow="ellipsis"),
        ProgressBar(total=max(1, total), completed=step, width=_fitting(width - _BESIDE_BAR, 30)),
        Text(text, no_wrap=True, overflow="ellipsis"),
        Text(f"({status})" if status else "", "yellow", no_wrap=True, overflow="ellipsis"),
    )
    return row


def _losses(pace: ProgressTracker, last: StepRecord) -> Text:
    mtp = "".join(f"  mtp {loss:.3f}" for loss in last.mtp_losses)
    text = Text(no_wrap=True, overflow="ellipsis")
    for name, value in pace.figures.items():
        text.append(f"{name} ").append(f"{figure_text(name, value)}  ", "bold")
    text.rstrip()
    text.append(mtp)
    if pace.evaluation is not None:
        at = f" at step {pace.evaluation.step:,}"
        # Steps of GRPO have enough figures for a line.
        text.append("  |  " if last.rollouts is None else "\n").append(
            evaluation_text(pace.evaluation), "cyan"
        ).append(at)
    return text


def _speed(pace: ProgressTracker, last: StepRecord) -> Text:
    parts = [
        rate(last.tokens_per_second),
        f"MFU {'?' if last.mfu is None else utilisation(last.mfu)}",
        f"{count(last.tokens)} of {count(pace.start.tokens_total)} tokens",
        memory(last.memory_bytes),
        f"lr {last.learning_rate:.2e}",
        f"grad {last.grad_norm:.2f}",
        last.phase,
    ]
    return Text("  ".join(parts), no_wrap=True, overflow="ellipsis")


def _experts(experts: tuple[ExpertRecord, ...], room: int, width: int) -> Table:
    """One line per MoE layer with a bar per expert; the least balanced layers if not all fit."""
    shown = sorted(experts, key=lambda layer: -layer.max_violation)[:room]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    load = f"load, {len(shown)} of {len(experts)} layers" if len(shown) < len(experts) else "load"
    for name, least in (("layer", 5), (load, None), ("MaxVio", 6), ("entropy", 7), ("bias", 16)):
        justify = "left" if name == load else "right"
        table.add_column(name, no_wrap=True, min_width=least, justify=justify)
    for layer in sorted(shown, key=lambda layer: layer.layer):
        table.add_row(
            str(layer.layer),
            Text(bars(layer.load, _fitting(width - _BESIDE_LOAD, 64)), "cyan"),
            f"{layer.max_violation:.2f}",
            f"{layer.entropy:.3f}",
            f"{layer.bias_min:+.3f} to {layer.bias_max:+.3f}",
        )
    return table


def _fitting(columns: int, most: int) -> int:
    """`columns`, between 8 and `most`."""
    return max(8, min(most, columns))
