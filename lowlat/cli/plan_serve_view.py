"""Tables of `lowlat plan serve`."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowlat.cli.served_model import ServedModel
from lowlat.cli.tables import number_table, print_block
from lowlat.plan.serving.estimate import ServingEstimate, ServingJob
from lowlat.plan.serving.machines import Cluster, ServingMachine
from lowlat.plan.serving.search import RankedLayouts
from lowlat.utils.formatting import counted, gigabytes


def show(
    served: ServedModel,
    job: ServingJob,
    machines: Cluster,
    ranked: RankedLayouts,
    *,
    top: int,
    left_out: int = 0,
    console: Console | None = None,
) -> None:
    """Print the best `top` layouts, the parts of the best one, and those that do not fit. left_out:
    layouts whose ranks do not divide the experts and their replicas."""
    console = Console() if console is None else console
    print_block(_title(served, job, machines), console)
    if ranked.fitting:
        print_block(_layouts(ranked.fitting[:top], len(ranked.fitting)), console)
        print_block(_best(ranked.fitting[0]), console)
    if ranked.too_large:
        print_block(_too_large(ranked.too_large[:top], len(ranked.too_large)), console)
    if left_out:
        print_block(_left_out(served, job, left_out), console)
    print_block(_assumed(machines.machine), console)
    console.print()


def _title(served: ServedModel, job: ServingJob, machines: Cluster) -> Text:
    size = served.weights.total(served.config)
    device = machines.machine
    lines = (
        f"{machines}, {counted(machines.devices, 'device')} of "
        f"{device.memory_bytes / 1e9:,.0f} GB at {device.memory_bandwidth / 1e9:,.0f} GB/s",
        f"{gigabytes(size)} GB of weights ({served.stored}), {job.cache} KV cache",
        f"{counted(job.users, 'user')} with {job.context:,} cached tokens; "
        f"prompts of {job.prompt:,} tokens",
    )
    return Text.assemble((served.name, "bold"), "\n", ("\n".join(lines), "dim"), overflow="fold")


def _layouts(found: list[ServingEstimate], total: int) -> Table:
    table = number_table(
        "Layout", "copies", "GB", "tok/s", "user", "first s", "MB/tok", notes=False
    )
    for each in found:
        table.add_row(
            str(each.layout),
            f"{each.replicas}",
            gigabytes(each.total_bytes),
            _number(each.tokens_per_second),
            _number(each.per_user),
            _number(each.first_token),
            _number(each.sent_bytes / 1e6),
        )
    table.caption = "GB: fullest rank; user: tok/s of one user; MB/tok: sent between ranks" + (
        f"; {total} layouts fit" if total > len(found) else ""
    )
    table.caption_justify = "left"
    return table


def _best(found: ServingEstimate) -> Table:
    table = number_table(f"Decode step of {found.layout}", "ms", "share")
    parts = found.decode
    bound = "memory" if parts.is_memory_bound else "arithmetic"
    rows = (
        ("weights", parts.weights, f"bound by {bound}"),
        ("attention", parts.attention, ""),
        ("messages", parts.messages, f"{found.messages:,.0f} per step"),
        ("layer overhead", parts.overhead, ""),
    )
    for name, seconds, note in rows:
        table.add_row(name, _number(seconds * 1e3), f"{seconds / parts.total:.0%}", note)
    table.add_section()
    table.add_row("slowest stage", _number(parts.total * 1e3), "", f"limit: {parts.limit}")
    for purpose, size in found.memory.items():
        table.add_row(f"{purpose}, GB", gigabytes(size), f"{size / found.total_bytes:.0%}", "")
    if found.balance is not None:
        before, after = found.balance
        note = f"{after:.2f} placed by load (EPLB)"
        table.add_row("busiest rank's experts", f"{before:.2f}x", "", note)
    return table


def _too_large(found: list[ServingEstimate], total: int) -> Table:
    table = number_table("Does not fit", "GB", "missing GB", "largest part", notes=False)
    for each in found:
        largest = max(each.memory, key=lambda purpose: each.memory[purpose])
        table.add_row(
            str(each.layout),
            gigabytes(each.total_bytes),
            gigabytes(each.missing_bytes),
            largest,
            style="red",
        )
    if total > len(found):
        table.caption = f"{total} layouts do not fit"
        table.caption_justify = "left"
    return table


def _left_out(served: ServedModel, job: ServingJob, number: int) -> Text:
    experts = 0 if served.config.moe is None else served.config.moe.n_routed_experts
    return Text(
        f"Left out: {counted(number, 'layout')} whose ranks do not divide "
        f"{experts} experts and {job.redundant_experts} replicas (--redundant-experts).",
        style="yellow",
        overflow="fold",
    )


def _assumed(machine: ServingMachine) -> Text:
    link, network = machine.node_bandwidth / 1e9, machine.network_bandwidth / 1e9
    return Text(
        f"Assumed: {machine.assumed_shares}; {link:g} GB/s and {machine.node_latency * 1e6:g} us "
        f"within a node, {network:g} GB/s and {machine.network_latency * 1e6:g} us between "
        f"machines, {machine.layer_seconds * 1e6:.0f} us per layer.",
        style="dim",
        overflow="fold",
    )


def _number(value: int | float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
