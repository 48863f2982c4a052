"""docs/commands.md: every command with its arguments and options, as --help has them.

python docs/list_commands.py docs/commands.md
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from lowlat.cli.main import app

HEAD = """# Commands and options

What `lowlat COMMAND --help` says, on one page (`python docs/list_commands.py docs/commands.md`).
Exit codes: 0 done, 1 for a difference that `compare` found, 2 for what the user can mend, told in
one line, 70 for a mistake of lowlat's own, 130 for Ctrl-C.
"""


def page() -> str:
    """The whole page."""
    group = typer.main.get_command(app)
    return "\n".join([HEAD, *(_section(*each) for each in _commands(group, "lowlat", None))])


def _commands(command: Any, name: str, parent: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every command that does something, by its whole name, with a context of its own."""
    context = type(command).context_class(command, info_name=name, parent=parent)
    names = command.list_commands(context) if hasattr(command, "list_commands") else []
    if not names or command.invoke_without_command:
        # A group's own action is a command of it, in brackets.
        yield context.command_path.partition(" (")[0], command, context
    for below in names:
        yield from _commands(command.get_command(context, below), below, context)


def _section(name: str, command: Any, context: Any) -> str:
    records = [parameter.get_help_record(context) for parameter in command.params]
    # Types, whose names differ from one version of typer to the next, tell little beside the help.
    names = (re.sub(r" <[^>]*>", "", record[0]) for record in records if record)
    told = (record[1] for record in records if record)
    rows = [f"| `{_cell(name)}` | {_cell(text)} |" for name, text in zip(names, told, strict=True)]
    table = ["| | |", "|---|---|", *rows] if rows else []
    said = re.sub(r"\n(?!\n)(?<!\n\n)", " ", (command.help or "").strip())
    return "\n".join([f"## {name}\n", said, "", *table, ""])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
