"""Tables that verbs print: columns of numbers, and pairs of names and values."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def number_table(*columns: str, notes: bool = True) -> Table:
    """A column of text, then columns of numbers; with `notes` also a last column of text."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold cyan")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    if notes:
        table.add_column("", style="dim")
    return table


def print_block(what: Table | Text, console: Console) -> None:
    """Print `what`, indented, after an empty line."""
    console.print(Padding(what, (1, 0, 0, 1), expand=False))


def print_rows(rows: dict[str, str], console: Console) -> None:
    """Names and values as a table without lines."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold cyan", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
