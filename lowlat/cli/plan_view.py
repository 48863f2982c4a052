"""Tables of `lowlat plan train` and `lowlat train --dry-run`."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowlat.cli.tables import number_table, print_block
from lowlat.plan.estimate import Estimate
from lowlat.plan.flops import TokenFlops
from lowlat.plan.job import TrainingJob
from lowlat.plan.memory import ACTIVATIONS, MemoryEstimate
from lowlat.plan.search import Neighbour, SearchResult
from lowlat.train.cost.dry_run import DryRun
from lowlat.utils.formatting import gigabytes

STEP_NOTES = {
    "compute": "forward, backward, recomputation",
    "traffic": "transfers not overlapped with computation",
    "bubble": "pipeline fill and drain",
    "synchronisation": "gradients and weights, once per step",
    "update": "the optimizer",
}


def show(
    name: str,
    found: Estimate,
    flops: TokenFlops,
    around: list[Neighbour],
    search: SearchResult | None,
    *,
    top: int,
    published_hours: float | None = None,
    console: Console | None = None,
) -> None:
    """Print the estimate `found`, the effect of single changes, and the best layouts."""
    console = Console() if console is None else console
    limit = found.machine.usable_bytes
    print_block(_title(name, found), console)
    print_block(_flops(flops), console)
    print_block(_memory(found.memory, limit), console)
    if found.transfers:
        print_block(_traffic(found), console)
    print_block(_time(found), console)
    print_block(_conclusion(found, published_hours), console)
    print_block(_changes(around), console)
    if search is not None:
        print_block(_ranking(search, top, found.job), console)
    console.print()


def show_dry_run(name: str, found: DryRun, console: Console | None = None) -> None:
    """Print the estimates of the recipe `name`."""
    console = Console() if console is None else console
    least, most = found.seconds
    facts = number_table("", "")
    facts.add_row("parameters", amount(found.parameters), "MTP modules included")
    facts.add_row("active per token", amount(found.active), "main model")
    facts.add_row("tokens", amount(found.tokens), f"in {found.steps:,} steps")
    facts.add_row("FLOPs", amount(found.total_flops), "of the whole training")
    processes = "" if found.processes == 1 else f", {found.processes} processes"
    facts.add_row("products", f"{amount(found.rate)}FLOP/s", f"measured{processes}")
    facts.add_row("time", f"{duration(least)} to {duration(most)}", "before the first step")
    print_block(Text(name, style="bold"), console)
    print_block(facts, console)
    print_block(_flops(found.flops[-1], found.trained_flops[-1]), console)
    print_block(_memory(found.memory, found.memory_bytes), console)
    console.print()


def _title(name: str, found: Estimate) -> Text:
    job = found.job
    facts = (
        f"{job.layout.devices:,} x {found.machine.name}",
        f"{job.batch_size:,} rows of {job.sequence_length:,} tokens",
        f"{job.micro_batches} micro-batches",
        f"{job.precision}, activation checkpointing: {job.activation_checkpointing}",
    )
    lines = (layout_name(job), " · ".join(facts))
    return Text.assemble((name, "bold"), "\n", ("\n".join(lines), "dim"), overflow="fold")


def layout_name(job: TrainingJob) -> str:
    """A layout in short, such as 'PP16 dualpipe · EP64 · ZeRO-1 over 128'."""
    layout = job.layout
    parts = [f"PP{layout.pipeline} {layout.schedule}"] if layout.pipeline > 1 else []
    parts += [
        f"{label}{size}"
        for label, size in (("EP", layout.expert), ("TP", layout.tensor), ("CP", layout.context))
        if size > 1
    ]
    parts += [f"ZeRO-{layout.zero} over {layout.fsdp}"] if layout.fsdp > 1 else []
    parts += [f"DP{layout.data}"] if layout.data > 1 else []
    return " · ".join(parts) or "one device"


def _short_name(job: TrainingJob) -> str:
    layout = job.layout
    tensor = f" TP{layout.tensor}" if layout.tensor > 1 else ""
    schedule = f" {layout.schedule}" if layout.pipeline > 1 else ""
    devices = f"PP{layout.pipeline}{schedule} EP{layout.expert}{tensor} ZeRO-{layout.zero}"
    return f"{devices} {job.activation_checkpointing}"


def _flops(flops: TokenFlops, trained: float | None = None) -> Table:
    table = number_table("FLOPs per token", "forward", "share")
    for part, value in flops.parts.items():
        if value:
            table.add_row(part, amount(value), f"{value / flops.forward:.1%}")
    table.add_section()
    table.add_row("forward", amount(flops.forward), "")
    trained = flops.training if trained is None else trained
    is_all = trained == flops.training
    note = "3x forward" if is_all else "gradients of trainable weights, with teacher and sampling"
    table.add_row("training", amount(trained), "", note, style="bold")
    if flops.recomputed:
        table.add_row("executed", amount(trained + flops.recomputed), "", "with recomputation")
    return table


def _memory(memory: MemoryEstimate, limit: int | float) -> Table:
    table = number_table("Memory per device", "GB", "share")
    for part, size in memory.parts.items():
        if size:
            note = ""
            if part == ACTIVATIONS:
                top = sorted(memory.activations.items(), key=lambda item: -item[1])[:2]
                note = "most: " + ", ".join(name for name, _ in top)
            table.add_row(part, gigabytes(size), f"{size / memory.total:.1%}", note)
    table.add_section()
    verdict = f"of {limit / 1e9:.1f} usable"
    if memory.total > limit:
        verdict = f"does not fit {limit / 1e9:.1f}; largest part: {memory.largest}"
    style = "bold" if memory.total <= limit else "bold red"
    table.add_row("total", gigabytes(memory.total), "", verdict, style=style)
    return table


def _traffic(found: Estimate) -> Table:
    table = number_table("Sent per device and step", "in node GB", "network GB")
    for sent in found.transfers:
        note = "overlapped with computation where possible" if sent.is_hidden else ""
        table.add_row(sent.kind, gigabytes(sent.node_bytes), gigabytes(sent.network_bytes), note)
    return table


def _time(found: Estimate) -> Table:
    table = number_table("Step", "seconds", "share")
    total = found.time.total
    for part, seconds in asdict(found.time).items():
        table.add_row(part, _seconds(seconds), f"{seconds / total:.1%}", STEP_NOTES[part])
    table.add_section()
    table.add_row("total", _seconds(total), "", f"MFU {found.mfu:.1%}", style="bold")
    return table


def _conclusion(found: Estimate, published_hours: float | None) -> Text:
    hours = found.device_hours(1e12)
    text = f"{amount(found.tokens_per_second, 1)} tokens/s, {hours:,.0f} device-hours per trillion "
    text += "tokens"
    if published_hours is not None:
        text += f"; published: {published_hours:,.0f}, ratio {hours / published_hours:.2f}"
    machine = found.machine
    return Text.assemble(
        (text + ".", "bold"),
        (
            f"\nAssumed: products at {machine.product_share:.0%} and attention at "
            f"{machine.attention_share:.0%} of the published rates, memory at "
            f"{machine.memory_share:.0%}, links at {machine.link_share:.0%}.",
            "dim",
        ),
        overflow="fold",
    )


def _changes(around: list[Neighbour]) -> Table:
    table = number_table("One change", "seconds", "GB")
    for each in around:
        if each.found is None:
            table.add_row(each.change, "-", "-", each.why)
            continue
        style = "green" if each.why == "this layout" else ""
        seconds, memory = _seconds(each.found.time.total), gigabytes(each.found.memory.total)
        table.add_row(each.change, seconds, memory, each.why, style=style)
    return table


def _ranking(search: SearchResult, top: int, own: TrainingJob) -> Table:
    table = number_table("Best layouts", "seconds", "bubble", "GB", "sent", notes=False)
    for place, found in enumerate(search.ranked):
        is_own = found.job.layout == own.layout
        if place < top or is_own:
            table.add_row(
                f"{place + 1:3} {_short_name(found.job)}",
                _seconds(found.time.total),
                f"{found.bubble_share:.1%}",
                gigabytes(found.memory.total),
                f"{found.network_bytes / 1e9:.0f}",
                style="green" if is_own else "",
            )
    failed = ", ".join(f"{count} {reason}" for reason, count in search.failed.items())
    table.caption = (
        f"sent: GB over the network; {search.tried} layouts tried{'; ' + failed if failed else ''}"
    )
    return table


def amount(value: int | float, digits: int = 2) -> str:
    """A count with its magnitude, such as '250.46 G' or '61.44 M'."""
    for size, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.{digits}f} {unit}"
    return f"{value:,.0f} "


def duration(seconds: int | float) -> str:
    """A duration, such as '50 s', '12 min', '3.4 h' or '2.1 days'."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _seconds(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or not value else f"{value:.4f}"
